"""The mesh: who is whose neighbour, in a world without processes."""

from __future__ import annotations

import pytest

from xdit_core import Axis, Mesh, Traffic
from xdit_core.planning.degrees import ordered
from xdit_core.testing.world import fake_world

AXES = ordered(
    (
        Axis("ulysses", 4, Traffic.PER_LAYER),
        Axis("stages", 4, Traffic.PER_STAGE),
        Axis("ring", 2, Traffic.PER_RING_HOP),
        Axis("cfg", 2, Traffic.PER_STEP),
        Axis("alone", 1, Traffic.PER_IMAGE),
    )
)


@pytest.mark.parametrize("rank", [0, 37, 63])
def test_chatty_axes_are_neighbours(rank):
    with fake_world(64, rank):
        mesh = Mesh(AXES, "cpu")
        assert mesh.ranks("ulysses") == [rank // 4 * 4 + i for i in range(4)]
        assert mesh.ranks("ring") == [rank % 4 + rank // 8 * 8 + 4 * i for i in range(2)]
        assert [mesh.index(a) for a in ("cfg", "stages", "ring", "ulysses")] == [
            rank // 32,
            rank // 8 % 4,
            rank // 4 % 2,
            rank % 4,
        ]
        assert mesh.group("alone") is None and mesh.ranks("alone") == [rank] and mesh.index("nothing") == 0
        mesh.close()


def test_joint_groups_are_in_mesh_order():
    """xDiT 0.7 makes [[0, 2], [1, 3]] in one place and [[0, 1], [2, 3]] in another for the same two axes."""
    with fake_world(64, 13):
        mesh = Mesh(AXES, "cpu")
        lines = mesh.lines(("ring", "ulysses"))
        assert len(lines) == 8 and [8, 9, 10, 11, 12, 13, 14, 15] in lines
        assert sorted(r for line in lines for r in line) == list(range(64))
        assert mesh.joint_group(("ring", "ulysses")).size() == 8
        assert mesh.lines(("stages",))[13 % 8] == mesh.ranks("stages")
        mesh.close()


def test_one_rank_needs_no_process_group():
    mesh = Mesh((Axis("ulysses", 1, Traffic.PER_LAYER),), "cpu")
    assert mesh.group("ulysses") is None and mesh.joint_group(("ulysses",)) is None and mesh.world == 1
