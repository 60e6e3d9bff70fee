"""A few random cases against their oracle; ``python tests/fuzz/test_fuzz.py 1000`` runs more, ``--seed`` and ``--only``
choose which."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from xdit_core.worker.entry import quieten

quieten()  # the workers too, which inherit the environment

from helpers.fuzz.comparing import Fuzzer, Verdict  # noqa: E402
from helpers.fuzz.drawing import Case, draw, simpler  # noqa: E402

BUDGET = int(os.environ.get("XDIT_FUZZ", "16"))


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


def test_random_cases() -> None:
    """A fixed budget of small cases."""
    fuzzer, names = Fuzzer(), schedulers()
    try:
        verdicts = {seed: fuzzer.judge(draw(seed, names, fast=True)) for seed in range(BUDGET)}
    finally:
        fuzzer.close()
    wrong = {seed: f"{draw(seed, names, fast=True)}: {v.why}" for seed, v in verdicts.items() if v.kind == "wrong"}
    assert not wrong
    assert sum(v.kind == "equal" for v in verdicts.values()) > BUDGET // 3


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
    fuzzer, names, end = Fuzzer(), schedulers(), time.monotonic() + 60 * options.minutes
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
