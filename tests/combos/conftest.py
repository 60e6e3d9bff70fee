"""Folders of tiny models, and oracles that are computed once."""

from __future__ import annotations

import pytest

from helpers.combos import oracle


@pytest.fixture(scope="session")
def folders(tiny_sd3_folder, tiny_pixart_folder):
    """Model name to folder."""
    return {"sd3": str(tiny_sd3_folder), "pixart_sigma": str(tiny_pixart_folder)}


@pytest.fixture(scope="session")
def expected(folders):
    """The oracle of a plan; plans with the same one share it."""
    known = {}

    def find(plan, model):
        run = plan.run
        key = (model, tuple(sorted(plan.reference.items())), run.guidance, run.images, run.steps, run.height, run.width)
        if key not in known:
            known[key] = oracle(plan, folders[model], model)
        return known[key]

    return find
