"""The token layout: every token has exactly one owner, whatever does not divide."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdit_core.parallel.tokens import TokenLayout, even_bounds, length, patch_bounds


def members(spans):
    return [i for a, b in spans for i in range(a, b)]


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 9),
    text=st.integers(0, 40),
    patches=st.integers(1, 8),
    shards=st.integers(1, 7),
    frames=st.integers(1, 3),
    text_first=st.booleans(),
)
def test_every_token_has_one_owner(rows, columns, text, patches, shards, frames, text_first):
    layout = TokenLayout(rows, columns, text, min(patches, rows), shards, frames, text_first)
    everything = list(range(layout.tokens + text))
    parts = [members(layout.joint(m, s)) for m in range(layout.patches) for s in range(shards)]
    assert sorted(i for part in parts for i in part) == everything
    for s in range(shards):  # ownership in warm-up is the ownership after it
        owned = sorted(i for m in range(layout.patches) for i in members(layout.joint(m, s)))
        assert sorted(members(layout.joint(None, s))) == owned
    for m in range(layout.patches):
        sizes = [length(layout.picture(m, s)) for s in range(shards)]
        assert max(sizes) - min(sizes) <= 1
        assert [i for s in range(shards) for i in members(layout.picture(m, s))] == members(layout.picture(m, None))


def test_patches_are_cut_by_work():
    """The patch with the text is the smaller one in rows, so that all take about as long."""
    bounds = patch_bounds(64, 64, 333, 4)
    work = [(b - a) * 64 + (333 if a == 0 else 0) for a, b in pairwise(bounds)]
    assert max(work) / min(work) < 1.08


def test_long_texts_leave_a_row_for_the_first_patch():
    assert patch_bounds(4, 2, 500, 4) == (0, 1, 2, 3, 4)


def test_uneven_patches_and_shards():
    """xDiT 0.7 reads its table for 128 rows, 3 patches and 2 ranks in the wrong order: 22/22, 20/22, 22/20 rows."""
    layout = TokenLayout(128, 1, patches=3, shards=2)
    sizes = [[length(layout.picture(m, s)) for s in range(2)] for m in range(3)]
    assert [abs(a - b) <= 1 for a, b in sizes] == [True] * 3 and sum(map(sum, sizes)) == 128


def test_more_patches_than_rows():
    with pytest.raises(ValueError, match="3 rows of tokens cannot be cut into 4 patches"):
        patch_bounds(3, 9, 0, 4)


def test_no_stage_is_left_empty():
    """Rounding up leaves 28 blocks on 8 stages as 4,4,4,4,4,4,4,0."""
    bounds = even_bounds(28, 8)
    assert [b - a for a, b in pairwise(bounds)] == [4, 4, 4, 4, 3, 3, 3, 3]
