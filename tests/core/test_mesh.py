"""The mesh: who is whose neighbour, in a world without processes."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from xdit_core import Axis, Engine, Mesh, Traffic
from xdit_core.parallel import mesh as mesh_module
from xdit_core.planning.degrees import ordered
from xdit_core.testing.runs import plan_for
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


def groups_of(plugins, folder, settings):
    """How many process groups an engine leaves this rank with, and their timeouts in seconds."""
    engine = Engine(plan_for(plugins, folder, settings))
    groups = list(dist.distributed_c10d._world.pg_map)
    timeouts = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    engine.close()
    return len(groups), timeouts, len(dist.distributed_c10d._world.pg_map)


COUNTS = [
    (["usp"], {"usp.ulysses": 4, "usp.ring": 2}, 3),
    (["usp"], {"usp.ulysses": 4}, 1),
    (["tp"], {"tp.degree": 2}, 1),
    (["pipefusion"], {"pipefusion.stages": 2}, 3),
    (["pipefusion"], {"pipefusion.stages": 3}, 4),
    (["cfg", "pipefusion", "usp"], {"pipefusion.stages": 2, "usp.ulysses": 2}, 5),
    (["cfg", "usp", "parallel_vae"], {"usp.ulysses": 2}, 3),
    (["dp", "distrifusion"], {"dp.degree": 2, "distrifusion.degree": 2, "images": 2}, 4),
]


@pytest.mark.parametrize(("plugins", "settings", "most"), COUNTS, ids=lambda x: "+".join(x) if type(x) is list else "")
def test_there_are_few_groups(tiny_sd3_folder, plugins, settings, most):
    """Each is a communicator, with buffers on the GPU; the world is one of them."""
    plan = plan_for(plugins, str(tiny_sd3_folder), settings)
    for rank in {0, plan.world - 1}:
        with fake_world(plan.world, rank):
            plan = plan_for(plugins, str(tiny_sd3_folder), settings)
            mesh, before = Mesh(plan.axes, "cpu"), 1
            strategies(plan, mesh)
            assert len(dist.distributed_c10d._world.pg_map) <= most
            mesh.close()
            assert len(dist.distributed_c10d._world.pg_map) == before


def strategies(plan, mesh):
    """Build the strategies of a plan, which ask for groups."""
    from xdit_core import Rank, Registry
    from xdit_core.settings import build

    registry = Registry()
    registry.select(plan.plugins)
    rank = Rank(plan, registry.model(plan.model)[0], mesh, torch.device("cpu"), torch.float32)
    classes = registry.call("xdit_settings", {name: {} for name in plan.plugins})
    settings = {name: build(classes.get(name), name + ".", plan.values) for name in plan.plugins}
    registry.call("xdit_build", {name: {"settings": value, "rank": rank} for name, value in settings.items()})


def test_groups_have_the_timeout_of_the_world(gloo, tiny_sd3_folder):
    """Torch would give them 30 minutes."""
    results = gloo.run(groups_of, ["pipefusion"], str(tiny_sd3_folder), {}, world=2, timeout=77)
    assert results == [(3, {timedelta(seconds=77)}, 1)] * 2


def test_messages_get_few_thread_blocks(monkeypatch):
    made = []

    class Options:
        def __init__(self):
            self.config = SimpleNamespace(max_ctas=32)
            made.append(self)

    nccl = SimpleNamespace(Options=Options)
    with fake_world(8):
        assert mesh_module.message_options() is None  # other backends have none
        monkeypatch.setattr(dist, "ProcessGroupNCCL", nccl, raising=False)
        monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
        monkeypatch.setattr(dist, "new_group", lambda ranks, **more: more["pg_options"])
        axes = (Axis("cfg", 2, Traffic.PER_STEP, messages=True), Axis("ulysses", 4, Traffic.PER_LAYER))
        mesh = Mesh(axes, "cpu")
        assert mesh.group("ulysses") is None and mesh.group("cfg").config.max_ctas == mesh_module.MESSAGE_CTAS
        monkeypatch.setattr(nccl, "Options", object)  # of a build without this
        assert not hasattr(mesh_module.message_options(), "config")
