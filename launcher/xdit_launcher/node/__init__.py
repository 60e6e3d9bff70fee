"""One machine of a run: its agent, its processes, and which of them failed first."""
