"""One machine of a run: its agent, its processes, and the search for the process that failed first."""
