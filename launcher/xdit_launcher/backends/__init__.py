"""The backends, which start the processes of a run: on this machine, over ssh, under Slurm, Ray or Kubernetes."""
