"""One rank as a process: meet the others, load, draw, write, say how it goes and why it failed."""
