"""Who may do what follows from what is declared, whether it is claimed or not."""

from __future__ import annotations

import pytest

from xdit_core import Axis, Built, Claim, Declaration, PlanRefused, Stages, Traffic, Transform, Wrap, hookimpl
from xdit_core.records import POINTS, SLOTS
from xdit_core.testing.runs import plan_for

LEVELS = [f"{point}/{level}" for point, levels in POINTS.items() for level in levels]


class Declares:
    """A strategy that declares something and claims nothing."""

    def __init__(self, **parts):
        self.parts = parts

    @hookimpl
    def xdit_declare(self, settings, facts):
        return Declaration(**self.parts)

    @hookimpl
    def xdit_build(self, settings, rank):
        return Built()


def axis(name, **parts):
    return Axis(name, 1, Traffic.PER_STAGE, **parts)


def both(folder, one, two):
    """The plan of two such strategies."""
    return plan_for(["one", "two"], str(folder), extra={"one": Declares(**one), "two": Declares(**two)})


@pytest.mark.parametrize(
    ("one", "two", "slot"),
    [
        (
            {"axes": (axis("a"),), "stages": Stages("a", lambda degree: (4,))},
            {"axes": (axis("b"),), "stages": Stages("b", lambda degree: (4,))},
            "blocks",
        ),
        ({"patches": lambda degrees: 2}, {"patches": lambda degrees: 3}, "patches"),
        ({"axes": (axis("a", shards_tokens=True),)}, {"axes": (axis("b", shards_tokens=True),)}, "tokens"),
        ({"transforms": (Transform("shard"),)}, {"transforms": (Transform("shard"),)}, "weights"),
        ({"wraps": (Wrap("attention", "cache"),)}, {"claims": (Claim("kv", "it keeps them"),)}, "kv"),
        ({"patches": lambda degrees: 2}, {"wraps": (Wrap("forward", "patches"),)}, "patches"),
    ],
)
def test_two_that_do_the_same_without_a_claim_are_refused(tiny_sd3_folder, one, two, slot):
    """Else the split would be of one and the patches of the other."""
    with pytest.raises(PlanRefused, match=f"one and two both need the slot '{slot}'.*; drop one of one and two"):
        both(tiny_sd3_folder, one, two)


@pytest.mark.parametrize("place", LEVELS)
def test_wraps_that_cannot_nest_are_refused(tiny_sd3_folder, place):
    same = {"wraps": (Wrap(*place.split("/")),)}
    if place in SLOTS:
        with pytest.raises(PlanRefused, match="one and two both need the slot"):
            both(tiny_sd3_folder, same, same)
    else:
        assert place in ("request/split", "forward/reuse", "trunk/reuse")
        assert [name for _, name in both(tiny_sd3_folder, same, same).wraps[place.split("/")[0]]] == ["one", "two"]


def test_the_plan_says_who_owns_what(tiny_sd3_folder):
    plan = plan_for(
        ["pipefusion", "usp"], str(tiny_sd3_folder), {"pipefusion.stages": 1, "usp.ulysses": 1, "usp.ring": 1}
    )
    assert {slot: plan.claims[slot] for slot in ("blocks", "patches", "kv", "tokens")} == {
        "blocks": "pipefusion",
        "patches": "pipefusion",
        "kv": "pipefusion",
        "tokens": "usp",
    }
