"""Ranks that stay and answer requests: what a notebook, a service and other front ends are made of."""
