"""The command line ``xdit-launch`` and the backends that start the processes of a run."""
