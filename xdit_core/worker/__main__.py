"""Run one rank: ``python -m xdit_core.worker plan.json``."""

from xdit_core.worker.entry import main

main()
