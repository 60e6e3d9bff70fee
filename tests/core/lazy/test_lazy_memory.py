"""Patch tensors: noise, copies, helpers, memory and depth."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from helpers.lazies import CUTS, MODES, B, C, H, W, base, lazy, same, y
from xdit_core.parallel.patch_tensor import LazyError, LazyValue, PatchTensor, materialized, patchwise
from xdit_core.parallel.placements import LocalPlacement, PatchPlacement

aten = torch.ops.aten

# randomness


@pytest.mark.parametrize("mode", MODES)
def test_noise_is_drawn_at_once(mode: str) -> None:
    draws: list[Callable[[Any], Any]] = [
        torch.randn_like,
        torch.rand_like,
        lambda x: torch.randint_like(x, 10),
        lambda x: torch.bernoulli(x, 0.3),
        lambda x: torch.randn_like(x, dtype=torch.float64),
        lambda x: x.new_zeros(3).normal_(),
        lambda x: x.normal_(),
        lambda x: x.half().uniform_(),
        lambda x: torch.zeros_like(x).uniform_(0, 1),
        lambda x: torch.empty_like(x).normal_(generator=torch.Generator().manual_seed(3)),
        lambda x: x.clone().bernoulli_(0.2),
    ]
    with MODES[mode]():
        for draw in draws:
            placement, log = LocalPlacement(), []
            torch.manual_seed(7)
            wanted, after = draw(base()), torch.rand(3)
            torch.manual_seed(7)
            got, after_lazy = draw(lazy(base(), placement, log=log)), torch.rand(3)
            assert not placement.materialized and not log
            same(got, wanted)
            assert torch.equal(after, after_lazy)
        for slow in (
            lambda x: torch.bernoulli(x.abs().clamp(0, 1)),
            lambda x: torch.nn.functional.dropout(x, 0.5),
            lambda x: torch.normal(x, 1.0),
            lambda x: torch.rrelu(x, training=True),
            lambda x: (torch.rrelu_(x, training=True), x)[1],
        ):
            torch.manual_seed(7)
            wanted = slow(base())
            torch.manual_seed(7)
            same(slow(lazy(base(), LocalPlacement())), wanted)


# helpers and the rest


def test_repr_does_not_evaluate() -> None:
    log: list[int] = []
    p = lazy(base(), LocalPlacement(), log=log)
    text = f"{p!r} {p} {[p]}"
    assert not log and "(2, 4, 10, 5)" in text and "bounds=(0, 3, 4, 8, 10)" in text
    p.materialize()
    assert "tensor(" in repr(p)


def test_save_and_copies() -> None:
    placement, x = LocalPlacement(), base()
    p, file = lazy(x, placement), io.BytesIO()
    twin = copy.deepcopy({"a": [p]})["a"][0]
    assert not placement.materialized
    p.add_(1)
    same(twin, x)
    torch.save({"latents": p}, file)
    file.seek(0)
    loaded = torch.load(file)["latents"]
    assert type(loaded) is torch.Tensor and torch.equal(loaded, x + 1)


def test_materialized_helper() -> None:
    placement, x = LocalPlacement(), base()
    nested = {"a": [lazy(x, placement), 1], "b": (x, {"c": lazy(x, placement) * 2})}
    plain = materialized(nested)
    assert type(plain["a"][0]) is torch.Tensor and torch.equal(plain["b"][1]["c"], x * 2)
    assert materialized(x) is x and materialized("text") == "text" and not placement.materialized


def test_patchwise() -> None:
    placement, log, x, z = LocalPlacement(), [], base(), base(seed=1)

    def norm(a: torch.Tensor, b: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return torch.cat([a, b]) / a.square().sum((0, 1, 3), keepdim=True) * scale

    got = patchwise(norm, lazy(x, placement, log=log), lazy(z, placement), 3.0)
    assert got.shape == (2 * B, C, H, W) and not log
    assert torch.allclose(got.materialize(), norm(x, z, 3.0))
    same(patchwise(norm, x, z), norm(x, z))
    same(patchwise(norm, x, lazy(z, placement)), norm(x, z))
    with pytest.raises(LazyError):
        patchwise(lambda a: a.sum(-2), lazy(x, placement))


def test_bad_arguments() -> None:
    placement, x = LocalPlacement(), base()
    good: dict[str, Any] = {"shape": x.shape, "dim": 2, "bounds": CUTS, "dtype": x.dtype, "device": "cpu"}
    good["placement"] = placement
    pieces = [x[..., a:b, :] for a, b in pairwise(CUTS)]
    for bad in ({"dim": 4}, {"bounds": (0, 4, 4, 8, 10)}, {"bounds": (0, 3, 4, 8, 9)}, {"bounds": (0, 10)}):
        with pytest.raises(LazyError):
            PatchTensor.make(pieces, **{**good, **bad})
    with pytest.raises(LazyError):
        PatchTensor.make([*pieces[:3], None], **good)
    with pytest.raises(LazyError):
        PatchTensor.make([*pieces[:3], pieces[0]], **good)
    p = PatchTensor.make([*pieces[:3], lambda: pieces[0]], **good)
    assert torch.equal(p.patch(2), pieces[2])
    for call in (lambda: p.patch(3), lambda: p.patch(4), lambda: p.rows(3, 3), lambda: p.rows(0, 11)):
        with pytest.raises(LazyError):
            call()
    with pytest.raises(RuntimeError):
        p + torch.zeros(B, C, 7, W)


def test_a_world_that_does_not_evaluate() -> None:
    class Remote(PatchPlacement):
        evaluates = False

        def materialize(self, tensor: PatchTensor) -> torch.Tensor:
            return torch.full(tensor.shape, 3.0, dtype=tensor.dtype)

    placement = Remote()
    p = PatchTensor.make(
        [None] * 4, shape=(B, C, H, W), dim=2, bounds=CUTS, dtype=y.dtype, device="cpu", placement=placement
    )
    q = torch.cat([p * 2 + y] * 2).chunk(2)[0] * 1
    q += 1
    assert not q._cells and not placement.materialized
    with pytest.raises(LazyError, match="no values"):
        q.patch(0)
    assert q.mean() == 3 and dict(placement.materialized) == {"aten.mean.default": 1}
    assert torch.equal(q.patch(0), torch.full((B, C, 3, W), 3.0))


def test_autocast_acts_when_recorded_not_when_evaluated() -> None:
    x = base(dtype=torch.bfloat16)
    p = patchwise(lambda a: a @ a.mT, lazy(x, LocalPlacement(), dim=1, bounds=(0, 1, 4)))
    with torch.autocast("cpu", dtype=torch.float16):
        assert p.patch(0).dtype == p.dtype == torch.bfloat16


# memory and depth


def test_evaluated_chains_keep_nothing() -> None:
    """200 steps of Euler: only the last latents live, without help of the garbage collector."""
    placement, seen = LocalPlacement(), []
    x = lazy(base(), placement)
    gc.disable()
    try:
        for _ in range(200):
            v = torch.cat([x] * 2)
            pieces = [v.rows(a, b) * 0.1 for a, b in pairwise(CUTS)]
            out = PatchTensor.make(
                pieces, shape=v.shape, dim=2, bounds=CUTS, dtype=v.dtype, device="cpu", placement=placement
            )
            u, t = out.chunk(2)
            x = (x.float() + (u + 2 * (t - u)) * -0.01).to(x.dtype)
            seen += [weakref.ref(x), weakref.ref(out), *map(weakref.ref, pieces)]
        del v, pieces, out, u, t
        assert len([r for r in seen if r() is not None]) == 1 + 4  # the last step is not evaluated yet
        values = [weakref.ref(x.patch(m)) for m in range(4)]
        assert len([r for r in seen if r() is not None]) == 1
        assert all(r() is not None for r in values)
        del x
        assert all(r() is None for r in (*seen, *values))
    finally:
        gc.enable()


def test_cells_drop_their_inputs() -> None:
    operand, first = base(), LazyValue(lambda: base())
    value = weakref.ref(operand)
    second = LazyValue(torch.add, first, operand)
    third = LazyValue(torch.mul, second, 2)
    del operand
    assert value() is not None
    assert torch.equal(third.value(), base() * 2 * 2)
    assert value() is None and third._inputs == () and second._inputs == ()
    inner = weakref.ref(second.value())
    del second
    assert inner() is None


def test_long_chains_do_not_recurse() -> None:
    x = torch.zeros(1, 4, 2)
    p = lazy(x, LocalPlacement(), dim=1, bounds=(0, 1, 4))
    with torch.no_grad():
        for _ in range(3000):
            p = p + 1
    assert p.patch(1).eq(3000).all()
    q = lazy(x, LocalPlacement(), dim=1, bounds=(0, 4))
    for _ in range(3000):
        q += 1
    del q  # nor does dropping one
    gc.collect()


def test_computed_at_most_once() -> None:
    log: list[int] = []
    p = lazy(base(), LocalPlacement(), log=log)
    q, r = p + 1, p * 2
    for t in (q, r, p, q, torch.cat([q, r])):
        for m in range(4):
            t.patch(m)
    assert log == [0, 1, 2, 3]
