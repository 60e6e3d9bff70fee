"""USP: every split equals the serial pipeline."""

from __future__ import annotations

import pytest

from xdit_core import PlanRefused
from xdit_core.testing.runs import generate, plan_for

WITHIN = 4e-6  # of the largest value, which is about 7; 1.5e-6 was seen on another processor


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (1, 3), (4, 2)])
def test_equals_serial(check_plan, ulysses, ring):
    check_plan(["usp"], {"usp.ulysses": ulysses, "usp.ring": ring}, world=ulysses * ring, within=WITHIN)


@pytest.mark.parametrize(("height", "width", "text"), [(36, 28, 0), (20, 44, 1), (12, 12, 7)])
def test_rows_that_do_not_divide(check_plan, height, width, text):
    changes = {"height": height, "width": width, "max_sequence_length": text, "images": 2}
    check_plan(["usp"], {"usp.ulysses": 2, "usp.ring": 2, **changes}, world=4, within=WITHIN)


def test_without_guidance(check_plan):
    check_plan(["usp"], {"usp.ulysses": 2, "guidance": 1.0}, world=2, within=WITHIN)


@pytest.mark.parametrize(("ulysses", "ring"), [(4, 1), (1, 4), (2, 2)])
def test_bytes_sent_match_the_table(gloo, tiny_sd3_folder, ulysses, ring):
    """Ulysses 4/N, Ring 2 of tokens x hidden x layers (the text's rows counted as tokens), for each rank and step."""
    world = ulysses * ring
    settings = {"usp.ulysses": ulysses, "usp.ring": ring, "max_sequence_length": 4}
    results = gloo.run(generate, ["usp"], str(tiny_sd3_folder), settings, world=world)
    rows, hidden, layers, steps, batch = 64 + 12 + 4, 32, 4, 4, 2
    one = rows * hidden * layers * steps * batch * 4
    for _, sent in results:
        if ulysses > 1:  # 4/N of the table, of which 1/U stays at home
            assert sent["ulysses"] == 4 * one // world * (ulysses - 1) // ulysses
        if ring > 1:  # each rank passes on all shares but the last
            assert sent["ring"] == 2 * one // ulysses // ring * (ring - 1)


@pytest.mark.parametrize("degree", [3, 5, 8])
def test_heads_that_do_not_divide_are_refused_with_values_that_work(tiny_sd3_folder, degree):
    with pytest.raises(PlanRefused, match=rf"sd3 has 4 heads.*usp.ulysses={degree}; use one of 1, 2, 4"):
        plan_for(["usp"], str(tiny_sd3_folder), {"usp.ulysses": degree})


def test_more_ranks_than_tokens_are_refused(tiny_sd3_folder):
    with pytest.raises(PlanRefused, match="leave fewer than one"):
        plan_for(["usp"], str(tiny_sd3_folder), {"usp.ring": 5, "height": 8, "width": 8})


def test_dual_attention(check_plan, tmp_path):
    from xdit_core.testing.models import save_tiny_sd3

    folder = str(save_tiny_sd3(tmp_path / "sd35", dual=(0, 1), layers=3))
    check_plan(["usp"], {"usp.ulysses": 2, "usp.ring": 2}, world=4, folder=folder, within=WITHIN)
