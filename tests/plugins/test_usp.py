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


def exchanged(rows):
    """On a rank: what Ulysses makes of queries, keys and values, and of an output; the same by yunchang if it can."""
    import torch
    import torch.distributed as dist
    from yunchang.comm.all_to_all import SeqAllToAll4D

    from xdit_usp.strategy import Ulysses

    rank, world = dist.get_rank(), dist.get_world_size()

    class Alone:
        sent, shard = {"ulysses": 0}, rank

        def group(self, axis):
            return dist.group.WORLD

        def degree(self, axis):
            return world

        def index(self, axis):
            return rank

    ulysses, made = Ulysses(Alone()), torch.Generator().manual_seed(3)
    whole = [torch.randn(2, 2 * world, sum(rows), 4, generator=made) for _ in range(3)]
    mine = [x.split(rows, dim=2)[rank] for x in whole]
    parts = ulysses.scatter_heads(mine, rows)
    back = ulysses.gather_heads(parts[0], rows)
    same = all(torch.equal(p, x.chunk(world, dim=1)[rank]) for p, x in zip(parts, whole, strict=True))
    if len(set(rows)) == 1:
        theirs = SeqAllToAll4D.apply(dist.group.WORLD, mine[1].transpose(1, 2), 2, 1).transpose(1, 2)
        same = same and torch.equal(parts[1], theirs)
    return same and torch.equal(back, mine[0])


@pytest.mark.parametrize("rows", [[3, 3], [4, 3], [2, 0, 1], [2, 2, 2, 2]])
def test_the_exchange_of_heads(gloo, rows):
    """Against all heads of all rows, and against the package yunchang where it divides evenly."""
    assert all(gloo.run(exchanged, rows, world=len(rows)))


def test_the_merge_of_the_ring_equals_that_of_yunchang_and_attention_at_once():
    import torch
    from yunchang.ring.utils import update_out_and_lse

    from xdit_usp.strategy import Merged

    made = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 3, n, 8, generator=made) for n in (4, 12, 12))
    flash, merged, out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, None, None, None
    for keys, values in zip(k.chunk(3, dim=2), v.chunk(3, dim=2), strict=True):
        part, part_lse = flash(q, keys, values)
        merged = Merged(part, part_lse) if merged is None else merged.add(part, part_lse)
        out, lse = update_out_and_lse(out, lse, part.transpose(1, 2), part_lse)
    torch.testing.assert_close(merged.out, out.transpose(1, 2))
    torch.testing.assert_close(merged.out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
