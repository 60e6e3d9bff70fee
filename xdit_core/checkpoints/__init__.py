"""Checkpoints as files: where they lie, what their JSON files and weight headers say, whether they are whole. Without
torch."""
