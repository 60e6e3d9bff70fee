"""Random combinations: equal to their oracle or refused before anything starts, and nothing hangs.

A fixed budget runs here; thousands run with ``python tests/combos/test_properties.py 5000``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, reproduce_failure, seed, settings
from hypothesis import strategies as st

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.combos import drawn, oracle
from xdit_core import PlanRefused
from xdit_core.testing import assert_close
from xdit_core.testing.models import save_tiny_pixart, save_tiny_sd3
from xdit_core.testing.pool import Pool
from xdit_core.testing.runs import plan_for

__all__ = ["reproduce_failure"]  # at hand for whoever pastes what hypothesis prints

BUDGET = int(os.environ.get("XDIT_EXAMPLES", "40"))
AXES = ("cfg", "distrifusion", "dp", "pipefusion", "tp", "usp")


@cache
def pool() -> Pool:
    """Workers for all examples."""
    return Pool()


@cache
def folder(model: str, heads: int, layers: int, text: int) -> str:
    """A tiny model of that shape."""
    path = Path(tempfile.mkdtemp()) / model
    if model == "sd3":
        return str(save_tiny_sd3(path, heads=heads, layers=layers, text_tokens=text))
    return str(save_tiny_pixart(path, heads=heads, layers=layers))


@st.composite
def requests(draw: Any) -> tuple[str, str, list[str], dict[str, Any]]:
    """A model, its folder, some strategies, settings that may or may not fit."""
    model = draw(st.sampled_from(("sd3", "sd3", "pixart_sigma")))
    small = st.sampled_from((1, 2, 2, 3, 4))
    heads, layers = draw(st.sampled_from((2, 3, 4, 4, 6))), draw(st.integers(2, 5))
    names = sorted(draw(st.sets(st.sampled_from(AXES), min_size=1, max_size=4)))
    unit = 4 if model == "sd3" else 8
    values: dict[str, Any] = {
        "model": model,
        "steps": draw(st.integers(1, 4)),
        "height": unit * draw(st.integers(1, 7 if unit == 4 else 4)),
        "width": unit * draw(st.integers(1, 7 if unit == 4 else 4)),
        "images": draw(st.integers(1, 3)),
        "guidance": draw(st.sampled_from((1.0, 5.0, 5.0))),
        "max_sequence_length": draw(st.integers(0 if model == "sd3" else 1, 7)),
    }
    if model == "pixart_sigma":
        values |= {"call.use_resolution_binning": False, "call.clean_caption": False}
    if "usp" in names:
        values |= {"usp.ulysses": draw(small), "usp.ring": draw(small)}
    if "pipefusion" in names:
        values |= {
            "pipefusion.stages": draw(small),
            "pipefusion.patches": draw(st.integers(1, 6)),
            "pipefusion.warmup": draw(st.integers(0, 3)),
        }
    if "distrifusion" in names:
        values |= {"distrifusion.degree": draw(small), "distrifusion.warmup": draw(st.integers(0, 3))}
    for name in {"dp", "tp"} & set(names):
        values[f"{name}.degree"] = draw(small)
    return model, folder(model, heads, layers, draw(st.sampled_from((5, 12)))), names, values


def check(request: tuple[str, str, list[str], dict[str, Any]]) -> bool:
    """One example; True if it ran."""
    model, path, names, values = request
    try:
        plan = plan_for(names, path, values)
    except PlanRefused as refused:
        assert all(problem.what and problem.fix for problem in refused.problems)
        return False
    if plan.world > 8:
        return False
    want = oracle(plan, path, model)
    for latents, _ in pool().run(drawn, names, path, values, world=plan.world, timeout=120):
        assert_close(latents, want)
    return True


@settings(
    max_examples=BUDGET,
    deadline=None,
    derandomize=BUDGET <= 100,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(requests())
def test_equal_or_refused(request: tuple[str, str, list[str], dict[str, Any]]) -> None:
    check(request)


def test_close_the_pool() -> None:
    """The workers must not outlive the session; stands last in the file."""
    pool().close()


def main() -> None:
    """Run many examples: ``python tests/combos/test_properties.py 5000 [seed]``."""
    many, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    ran = []
    body = given(requests())(lambda request: ran.append(check(request)))
    seed(first)(
        settings(max_examples=many, deadline=None, database=None, suppress_health_check=list(HealthCheck))(body)
    )()
    pool().close()
    print(f"{len(ran)} examples, {sum(ran)} ran and were equal, the others were refused")


if __name__ == "__main__":
    main()
