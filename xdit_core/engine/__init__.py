"""The engine: loads a pipeline for one rank, puts the strategies in, answers requests."""
