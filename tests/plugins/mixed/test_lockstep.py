"""Ranks that decide differently are told apart at the first difference, and ``rank.agree`` makes them decide alike."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist

from xdit_core import Built, Declaration, Engine, LockstepError, PluginError, Registry, Wrap, hookimpl
from xdit_core.observe.lockstep import Lockstep
from xdit_core.testing.pool import PoolError
from xdit_core.testing.runs import generate, plan_for

USP = {"usp.ulysses": 2, "usp.ring": 1}
RING = {"usp.ulysses": 1, "usp.ring": 2}
TP = {"tp.degree": 2}


class Skips:
    """Leaves out the blocks on rank 1 in the second step, as a step cache might that looks at its own part of the
    picture."""

    def __init__(self, agrees):
        self.agrees, self.skip = agrees, False

    @hookimpl
    def xdit_declare(self, settings, facts):
        return Declaration(wraps=(Wrap("trunk", "reuse"), Wrap("forward", "reuse")))

    @hookimpl
    def xdit_build(self, settings, rank):
        def decide(inner, call):
            self.skip = rank.context.step == 1 and rank.mesh.rank == 1
            if self.agrees:
                self.skip = rank.agree(self.skip, any)
            return inner(call)

        def reuse(inner, rows):
            return rows if self.skip else inner(rows)

        return Built(wraps={"forward/reuse": decide, "trunk/reuse": reuse})


def skipping(plugins, folder, settings, agrees):
    """Latents of a run in which rank 1 would leave out the blocks of a step, or the error of this rank."""
    torch.set_num_threads(1)
    extra = {"skips": Skips(agrees)}
    engine = Engine(plan_for(["skips", *plugins], folder, {"timeout": 30, **settings}, extra=extra), Registry(extra))
    try:
        return engine.generate("a red fox", steps=3).latents.clone()
    except (LockstepError, PluginError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("plugins", "settings", "first", "second"),
    [
        (
            ["usp"],
            USP,
            "at alltoall_base of .* in step 2, attention/exchange of usp, block 0",
            "at allgather of .* in step 2, trunk/gather of usp",
        ),
        (["tp"], TP, r"at all\w+ of .* in step 2, block 0", r"at all\w+ of .* in step 3, block 0"),
    ],
)
def test_the_first_difference_is_named(gloo, tiny_sd3_folder, plugins, settings, first, second):
    """Without the check usp blames the wrong rank after the timeout, and tp pairs sums of different steps without a
    word."""
    results = gloo.run(skipping, plugins, str(tiny_sd3_folder), {**settings, "lockstep": "yes"}, False, world=2)
    for error in results:
        assert isinstance(error, str), "the ranks did not part"
        assert re.match(
            rf"LockstepError: ranks that must do the same have parted: rank 0 is {first}; rank 1 is {second}\. .*"
            r"let it decide with rank\.agree",
            error,
        ), error


def skipping_fails(*arguments):
    """As `skipping`, the error raised: it ends the other rank, whose wait for a message nothing else would end."""
    result = skipping(*arguments)
    if isinstance(result, str):
        raise RuntimeError(result)


def test_a_rank_that_comes_to_no_collective_is_named(gloo, tiny_sd3_folder):
    """A ring has messages only, so the rank that skips waits for one that is in the ring; half of the timeout ends
    it."""
    settings = {**RING, "lockstep": "yes", "timeout": 4}
    parted = (
        r"LockstepError: .* parted: rank 0 is at (send|recv) in step 2, attention/ring of usp, block 0; "
        r"rank 1 is at allgather of .* in step 2, trunk/gather of usp\."
    )
    with pytest.raises(PoolError, match=parted):
        gloo.run(skipping_fails, ["usp"], str(tiny_sd3_folder), settings, False, world=2)


@pytest.mark.parametrize(("plugins", "settings"), [(["usp"], USP), (["tp"], TP)])
def test_agree_makes_it_right(gloo, tiny_sd3_folder, plugins, settings):
    """Any rank that would skip makes all skip: as one process that skips in that step."""
    results = gloo.run(skipping, plugins, str(tiny_sd3_folder), {**settings, "lockstep": "yes"}, True, world=2)
    assert not isinstance(results[0], str), results[0]
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], alone(str(tiny_sd3_folder)), atol=1e-5, rtol=1e-5)


def alone(folder):
    """One process that leaves out the blocks in the second step."""

    class Always(Skips):
        @hookimpl
        def xdit_build(self, settings, rank):
            return Built(
                wraps={
                    "forward/reuse": lambda inner, call: inner(call),
                    "trunk/reuse": lambda inner, rows: rows if rank.context.step == 1 else inner(rows),
                }
            )

    extra = {"skips": Always(False)}
    return Engine(plan_for(["skips"], folder, extra=extra), Registry(extra)).generate("a red fox", steps=3).latents


def agreeing(folder):
    """What ranks of two pictures of two ranks each agree on."""
    engine = Engine(plan_for(["dp", "usp"], folder, {"dp.degree": 2, **USP}))
    rank, me = engine.rank, dist.get_rank()
    found = [
        rank.agree(me),
        rank.agree(me, max),
        rank.agree(me * 0.5, sum),
        rank.agree(me % 2 == 1, any),
        rank.agree(me % 2 == 1),
    ]
    engine.close()
    return found


def test_ranks_of_one_picture_agree_and_others_do_not_matter(gloo, tiny_sd3_folder):
    results = gloo.run(agreeing, str(tiny_sd3_folder), world=4)
    assert results == [[0, 1, 0.5, True, False]] * 2 + [[2, 3, 2.5, True, False]] * 2
    assert [type(x) for x in results[0]] == [int, int, float, bool, bool]


def not_agreeing(folder):
    """Ranks that ask in different steps, and a rank that does not ask."""
    engine = Engine(plan_for(["usp"], folder, {**USP, "timeout": 4}))
    me, errors = dist.get_rank(), []
    engine.rank.running.context = engine.rank.context.but(step=me)
    for ask in (True, me == 0):
        try:
            if ask:
                engine.rank.agree(True)
        except (LockstepError, PluginError) as error:
            errors.append(str(error))
    return errors


def test_ranks_that_do_not_ask_alike_are_told(gloo, tiny_sd3_folder):
    results = gloo.run(not_agreeing, str(tiny_sd3_folder), world=2)
    for errors in results:
        assert errors[0].startswith(
            "the ranks of a picture asked for an agreement in different steps (rank 0 in step 1, rank 1 in step 2)"
        )
    assert results[0][1].startswith("rank 0 asked in step 1 for an agreement that others did not ask for within 2 s")


def test_one_rank_agrees_with_itself(tiny_sd3_folder):
    rank = Engine(plan_for([], str(tiny_sd3_folder))).rank
    assert rank.agree(3) == 3 and rank.agree(False) is False
    with pytest.raises(
        PluginError, match=r"rank\.agree takes a bool or a number, and was given 'yes'; decide on one of these"
    ):
        rank.agree("yes")


@pytest.mark.parametrize(
    ("plugins", "settings", "world"),
    [
        (["cfg", "usp"], {"usp.ulysses": 1, "usp.ring": 2}, 4),
        (["pipefusion", "tp"], {"pipefusion.stages": 2, **TP}, 4),
        (["distrifusion", "parallel_vae"], {"distrifusion.degree": 2, "output_type": "image"}, 2),
        (["dp"], {"dp.degree": 2, "images": 3}, 2),
    ],
)
def test_a_right_run_passes(gloo, tiny_sd3_folder, plugins, settings, world):
    """Strategies of ours never part."""
    assert (
        gloo.run(passes, plugins, str(tiny_sd3_folder), {**settings, "lockstep": "yes"}, world=world) == [True] * world
    )


def passes(plugins, folder, settings):
    """A request, and what the check saw of it."""
    torch.set_num_threads(1)
    engine = Engine(plan_for(plugins, folder, settings))
    engine.generate("a red fox", steps=2)
    engine.close()
    return True


def test_nothing_is_in_place_without_the_setting(tiny_sd3_folder, monkeypatch):
    def alarm(*args):
        raise RuntimeError("made")

    monkeypatch.setattr(Lockstep, "__init__", alarm)
    assert generate([], str(tiny_sd3_folder))[0].shape[0] == 1
