"""The engine: load a pipeline for one rank, put the strategies in, and answer requests."""
