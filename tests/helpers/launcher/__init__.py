"""Plugins that fail, hosts made of network namespaces, a Slurm of one machine, and bad input."""

from pathlib import Path

FAULTY = Path(__file__).with_name("faulty")  # distributions that are installed by being on the path
SKEWED = Path(__file__).with_name("skewed")
