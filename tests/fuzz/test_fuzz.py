"""A few random cases against their oracle; ``python tests/fuzz/test_fuzz.py 1000`` runs more, ``--seed`` and ``--only``
choose which."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest

from xdit_core.worker.entry import quieten

quieten()  # the workers too, which inherit the environment

from helpers.fuzz.comparing import Fuzzer, Verdict  # noqa: E402
from helpers.fuzz.drawing import Case, draw, simpler  # noqa: E402
from helpers.models.families import Family  # noqa: E402
from xdit_core.testing.pool import Pool  # noqa: E402

# These cover each strategy alone and with others, joint and cross-attention, classes, masks and videos, adapters, given
# pipelines, inference mode, step callbacks and several requests and prompts.
SEEDS = (5, 27, 30, 42, 68, 166, 220, 312)


def schedulers() -> tuple[str, ...]:
    """All scheduler classes of diffusers that can be imported here."""
    import diffusers

    found = []
    for name in sorted(diffusers._import_structure["schedulers"]):
        try:
            cls = getattr(diffusers, name, None)
            if isinstance(cls, type) and hasattr(cls, "step"):
                found.append(name)
        except ImportError:
            found.append(name)  # it needs a package that is not here, which has to be said
    return tuple(found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_random_case(gloo: Pool, seed: int) -> None:
    case = draw(seed, schedulers(), fast=True)
    verdict = Fuzzer(gloo).judge(case)
    assert verdict.kind == "equal", f"{case}: {verdict}"


def test_the_seeds_cover_what_is_drawn() -> None:
    cases = [draw(seed, schedulers(), fast=True) for seed in SEEDS]
    assert {plugin for case in cases for plugin in case.plugins} == set(Family.strategies) - {"parallel_vae"}
    assert len({case.family for case in cases}) == len(SEEDS)
    for name in ("scheduler", "given", "inference", "lora"):
        assert {bool(getattr(case, name)) for case in cases} == {True, False}, name
    assert {bool(one.callback) for case in cases for one in case.asks} == {True, False}


def shrink(fuzzer: Fuzzer, case: Case, verdict: Verdict, seconds: float) -> tuple[Case, Verdict]:
    """A case with as little as possible that is still wrong."""
    end = time.monotonic() + seconds
    again = True
    while again and time.monotonic() < end:
        again = False
        for less in simpler(case):
            found = fuzzer.judge(less)
            if found.kind == "wrong":
                case, verdict, again = less, found, True
                break
            if time.monotonic() > end:
                break
    return case, verdict


def main() -> None:
    """Run many cases and print what was wrong."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("cases", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; each has its own, one after the other")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--fast", action="store_true", help="as in the test: float32, at most 4 ranks")
    parser.add_argument("--shrink", type=float, default=0, help="seconds for making each wrong case smaller")
    parser.add_argument("--verbose", action="store_true", help="a line for each case")
    options = parser.parse_args()
    fuzzer, names, end = Fuzzer(Pool()), schedulers(), time.monotonic() + 60 * options.minutes
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for seed in range(options.seed, options.seed + options.cases):
        if time.monotonic() > end:
            break
        case = draw(seed, names, options.fast)
        verdict = fuzzer.judge(case)
        counts[verdict.kind] += 1
        if verdict.kind in ("refused", "skipped"):
            reasons[f"{verdict.kind}: {' '.join(verdict.why.split())[-160:]}"] += 1
        if options.verbose:
            print(seed, verdict.kind, case, " ".join(verdict.why.split())[-300:], flush=True)
        if verdict.kind == "wrong":
            if options.shrink:
                case, verdict = shrink(fuzzer, case, verdict, options.shrink)
            print(f"WRONG seed {seed}: {case}\n  {verdict.why[-1500:]}", flush=True)
    fuzzer.close()
    for reason, count in reasons.most_common(40):
        print(f"{count:5d}  {reason}")
    print(f"{sum(counts.values())} cases: {dict(counts)}")
    sys.exit(bool(counts["wrong"]))


if __name__ == "__main__":
    main()
