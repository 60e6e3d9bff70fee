"""One rank as a process: meet the other ranks, load, draw, write, and report progress and failure."""
