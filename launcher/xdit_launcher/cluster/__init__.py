"""One run over several machines, seen from where it was started: hosts, placement, the connection to their agents."""
