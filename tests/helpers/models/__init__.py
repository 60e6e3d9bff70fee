"""Tiny pipelines of every model, the same request in our words and in those of diffusers, and what is compared."""
