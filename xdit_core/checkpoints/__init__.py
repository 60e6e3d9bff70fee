"""Checkpoints as files: where they are, what their JSON files and weight headers say, whether they are complete.

Without torch.
"""
