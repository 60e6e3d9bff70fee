"""One run over several machines, seen from the launcher: hosts, placement, and the connection to their agents."""
