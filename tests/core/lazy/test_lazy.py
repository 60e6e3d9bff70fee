"""Patch tensors: every operation gives what an eager tensor gives; those that should stay lazy do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from helpers.lazies import CUTS, MODES, B, C, H, W, base, chan, col, half, lazy, mask, row, same, sigma, y
from xdit_core.parallel.patch_tensor import LazyError, PatchTensor
from xdit_core.parallel.placements import LocalPlacement, PatchPlacement

aten = torch.ops.aten

# name, function of (x, z): both patch tensors or both plain
STAY_LAZY: dict[str, Callable[[Any, Any], Any]] = {
    "scalar": lambda x, z: 2.5 * x - 1,
    "rsub": lambda x, z: 1 - x,
    "0-dim": lambda x, z: x * sigma + sigma,
    "plain full": lambda x, z: x * y + y,
    "plain first": lambda x, z: y - x,
    "plain rows": lambda x, z: x * row,
    "plain columns": lambda x, z: x + col,
    "plain channels": lambda x, z: x * chan,
    "two patch tensors": lambda x, z: x + z * 3,
    "itself": lambda x, z: x * x + x,
    "promotion": lambda x, z: (x.half() * half, x.half() + z, x.half() * sigma, x.double() * y),
    "int promotion": lambda x, z: x.to(torch.int32) * 2.5,
    "higher rank": lambda x, z: x[0] * y,
    "higher rank, patched": lambda x, z: x[0, 0] * z,
    "broadcast up": lambda x, z: x * base(3, B, C, H, W, seed=8),
    "where": lambda x, z: (torch.where(mask, x, z), torch.where(x > 0, x, 0.0), torch.where(x > z, y, col)),
    "compare": lambda x, z: (x > z, x == y, x <= 0, ~(x > 0)),
    "clamp": lambda x, z: (x.clamp(-0.5, 0.5), x.clamp(min=row), torch.clamp(x, max=z)),
    "math": lambda x, z: (x.abs().sqrt(), x.neg(), torch.addcmul(x, z, y), torch.lerp(x, z, 0.25), x**2, x.sign()),
    "masked_fill": lambda x, z: x.masked_fill(mask, 0.0),
    "dtype": lambda x, z: (x.float(), x.half().float(), x.to(torch.bfloat16), x.to(y.dtype), x.type_as(half), x.bool()),
    "to device": lambda x, z: (x.to("cpu"), x.cpu(), x.to(device="cpu", dtype=torch.float16)),
    "cat": lambda x, z: (torch.cat([x] * 2), torch.cat([x, y], 1), torch.cat([y, z, x], -1), torch.cat([y, x.half()])),
    "stack": lambda x, z: tuple(torch.stack([x, y, z], d) for d in range(-5, 5)),
    "chunk": lambda x, z: (x.chunk(2), x.chunk(2, 1), x.chunk(3, 1), x.tensor_split(2, 1)),
    "split": lambda x, z: (x.split(2, 1), x.split([1, 3], 1), torch.split(x, [2, 3], -1)),
    "guidance": lambda x, z: (lambda u, t: u + 7.5 * (t - u))(*torch.cat([x, z]).chunk(2)),
    "slices": lambda x, z: (x[:, :2], x[..., 1::2], x[0], x[:, 1:3, :, 2], x[None], x[-1:], x.narrow(1, 1, 2), x[...]),
    "slices of all": lambda x, z: (x[:], x[:, :, :], x[:, :, 0:H], x[..., -H:, :], x.split(H, 2), x.split([H], -2)),
    "slices of rows": lambda x, z: (x[:, :, 2:7], x[..., -3:, :], x.chunk(2, 2), x.split([1, 9], 2)[1], x[:, :, :-4]),
    "copies": lambda x, z: (x.clone(), x.contiguous(), x.detach(), x.data, +x, aten.alias(x), x.view_as(x)),
    "expand": lambda x, z: (x[:1].expand(3, C, H, W), x.expand(2, -1, -1, -1, -1), x[:1].expand_as(y), x.expand_as(y)),
    "unbind": lambda x, z: (x.unbind(0), x.unbind(1), tuple(x)),
    "unsqueeze": lambda x, z: tuple(x.unsqueeze(d) for d in range(-5, 5)),
    "squeeze": lambda x, z: (x[:1].squeeze(), x[:1].squeeze(0), x[:, :1].squeeze((0, 1)), x.squeeze(2), x.squeeze()),
    "repeat": lambda x, z: (x.repeat(2, 1, 1, 3), x.repeat(2, 1, 1, 1, 1)),
    "permute": lambda x, z: (x.permute(2, 0, 3, 1), x.transpose(1, 2), x.mT, x[0, 0].t(), x.movedim(2, 0)),
    "view": lambda x, z: (x.view(1, B, C, H, W), x.view(B * C, H, W), x.view(B, 2, 2, H, W), x.view(-1, H, W, 1)),
    "reshape": lambda x, z: (x.reshape(B, 1, C, H, W), x.flatten(0, 1), x.unflatten(1, (2, -1)), x.view(x.shape)),
    "reshape of moved": lambda x, z: (x.permute(2, 0, 1, 3) * 2, x.transpose(-1, -2).reshape(B * C, W, H)),
    "numpy scalars": lambda x, z: (np.float64(2) * x, x * np.float32(0.3)),
}
MATERIALIZE: dict[str, Callable[[Any, Any], Any]] = {
    "reductions": lambda x, z: (x.sum(), x.mean((1, 2, 3), keepdim=True), x.std(dim=list(range(1, 4))), x.amax(2)),
    "cat of rows": lambda x, z: torch.cat([x, z], -2),
    "one row": lambda x, z: (x[:, :, 3], x[..., 4:5, :], x.unbind(2)[1], x[..., ::2, :]),
    "flip": lambda x, z: (x.flip(2), x.roll(1, 2)),
    "index": lambda x, z: (x[[0, 1, 1]], x[mask], x[:, [0]]),
    "flatten": lambda x, z: (x.flatten(), x.reshape(B, C, -1), x.view(B, C, 2, 5, W), x.reshape(-1, W)),
    "matmul": lambda x, z: (x @ base(W, 3), torch.einsum("bchw,bchw->b", x, z)),
    "item": lambda x, z: (x[0, 0, 0, 0].item(), float(x.sum()), bool((x > 0).any()), torch.equal(x, z)),
    "numpy": lambda x, z: (x.cpu().numpy().tolist(), np.asarray(x.half()).tolist(), (x * 2).tolist()),
    "repeat rows": lambda x, z: x.repeat(1, 1, 2, 1),
    "different dims": lambda x, z: x[0, 0].expand(5, H, 5) + z[0, 0].mT.expand(5, W, H)[..., :5, :5].repeat(1, 2, 1),
    "expand rows": lambda x, z: x.sum(2, keepdim=True).expand_as(x) + x,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*STAY_LAZY, *MATERIALIZE])
def test_operation(name: str, mode: str) -> None:
    fn = STAY_LAZY.get(name) or MATERIALIZE[name]
    with MODES[mode]():
        placement, log = LocalPlacement(), []
        x, z = base(), base(seed=9)
        got = fn(lazy(x, placement, log=log), lazy(z, placement, log=log))
        if name in STAY_LAZY:
            assert not placement.materialized and not log
        else:
            assert placement.materialized
        same(got, fn(x, z))


@pytest.mark.parametrize("name", STAY_LAZY)
def test_operation_without_values(name: str) -> None:
    """On a rank that never evaluates: the same shapes, nothing held, nothing computed."""
    placement = PatchPlacement()
    placement.evaluates = False
    x, z = base(), base(seed=9)
    nothing = [None] * 4
    args = [
        PatchTensor.make(nothing, shape=t.shape, dim=2, bounds=CUTS, dtype=t.dtype, device="cpu", placement=placement)
        for t in (x, z)
    ]

    def check(a: Any, b: Any) -> None:
        if isinstance(b, (list, tuple)):
            assert len(a) == len(b)
            for p, q in zip(a, b, strict=True):
                check(p, q)
        else:
            assert isinstance(a, PatchTensor) and not a._cells
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())

    check(STAY_LAZY[name](*args), STAY_LAZY[name](x, z))
    assert not placement.materialized


def test_patched_dim_is_counted_from_the_right() -> None:
    x = lazy(base(), LocalPlacement(), dim=2)
    assert (x.patched_dim, x.patches, x.bounds, x.dim()) == (-2, 4, CUTS, 4)
    assert (x[0] * y).patched_dim == -2 and x.permute(2, 0, 1, 3).patched_dim == -4
    assert torch.stack([x, x], -1).patched_dim == -3 and torch.stack([x, x], 0).patched_dim == -2


def test_other_patched_dim() -> None:
    placement = LocalPlacement()
    x = base()
    p = lazy(x, placement, dim=1, bounds=(0, 1, 4))
    same((p * chan + y)[:, :, 2], (x * chan + y)[:, :, 2])
    assert not placement.materialized
    same(p + lazy(x, placement), x + x)
    assert placement.materialized


def test_only_what_is_asked_for_is_evaluated() -> None:
    log: list[int] = []
    x = base()
    p = lazy(x, LocalPlacement(), log=log)
    q = torch.cat([p * 2, y]).chunk(2)[0] + p
    assert torch.equal(q.patch(1), (x * 2 + x)[..., 3:4, :])
    assert log == [1]
    assert torch.equal(q.rows(2, 5), (x * 2 + x)[..., 2:5, :])
    assert log == [1, 0, 2]
    q.materialize()
    assert log == [1, 0, 2, 3]


def test_different_patchings_meet() -> None:
    placement, x, z = LocalPlacement(), base(), base(seed=1)
    for bounds in [(0, 10), (0, 5, 10), (0, 1, 3, 4, 9, 10)]:
        p, q = lazy(x, placement), lazy(z, placement, bounds=bounds)
        out = p * q
        assert out.bounds == tuple(sorted({*CUTS, *bounds}))
        same(out, x * z)
        same(torch.cat([q, p]), torch.cat([z, x]))
        q += p
        same(q, z + x)
    assert not placement.materialized


def test_a_row_waits_for_no_more_than_it_needs() -> None:
    """A tensor of one patch, say of warm-up, meets one of four: the rows of the first patch need the first alone."""
    log: list[int] = []
    placement = LocalPlacement()
    whole, p = lazy(base(), placement, bounds=(0, H)), lazy(base(), placement, log=log)
    assert torch.equal((whole + p).rows(0, 3), (base() * 2)[..., :3, :])
    assert log == [0]


# writing

IN_PLACE: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, z: x.add_(z, alpha=2),
    "add itself": lambda x, z: x.add_(x),
    "mul plain": lambda x, z: x.mul_(y).sub_(1).div_(3).clamp_(-0.2, 0.3),
    "copy": lambda x, z: x.copy_(z),
    "copy plain": lambda x, z: x.copy_(y),
    "copy and cast": lambda x, z: x.copy_(z.half()),
    "copy broadcast": lambda x, z: x.copy_(col),
    "zero": lambda x, z: x.zero_(),
    "fill": lambda x, z: x.fill_(2),
    "lerp": lambda x, z: x.lerp_(z, 0.3),
    "promoted": lambda x, z: x.mul_(sigma.expand(B, C, H, W)),
    "positive": lambda x, z: ((+x).mul_(2), x)[1],
    "masked": lambda x, z: x.masked_fill_(mask, 2.0),
}
IN_PLACE_SLOWLY: dict[str, Callable[[Any, Any], Any]] = {
    "view": lambda x, z: (x[:, :2].mul_(2), x)[1],
    "setitem": lambda x, z: (x.__setitem__((slice(None), 1), 0.0), x)[1],
    "setitem of rows": lambda x, z: (x.__setitem__((..., slice(2, 5), slice(None)), z[..., 2:5, :]), x)[1],
    "setitem of mask": lambda x, z: (x.__setitem__(mask, 7.0), x)[1],
    "base with views": lambda x, z: (lambda v: (x.add_(z), v, x))(x[:, 1:3])[1:],
    "siblings": lambda x, z: (lambda a, b: (a.add_(b), a, b, x))(*x.chunk(2))[1:],
    "view of view": lambda x, z: (lambda v: (v[0].zero_(), v, x))(x[:, 1:].transpose(0, 1))[1:],
    "detached": lambda x, z: (lambda v: (v.mul_(3), v, x))(x.detach())[1:],
    "expanded": lambda x, z: (lambda v: (x.mul_(3), v, x))(x.expand(3, B, C, H, W))[1:],
    "plain view afterwards": lambda x, z: (lambda v: (v.mul_(3), x * 1))(x.flatten())[1],
    "in-place after that": lambda x, z: (x.mean(), x.mul_(2), x * 1)[2],
    "put": lambda x, z: x.index_fill_(0, torch.tensor([1]), 3.0),
    "unsafe view of a view": lambda x, z: (lambda v: (v[0].zero_(), v, x))(aten._unsafe_view(x[1:], [C, H, W]))[1:2],
    "copy_ broadcast patches": lambda x, z: x.copy_(z[:1]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*IN_PLACE, *IN_PLACE_SLOWLY])
def test_in_place(name: str, mode: str) -> None:
    fn = IN_PLACE.get(name) or IN_PLACE_SLOWLY[name]
    with MODES[mode]():
        placement, x, z = LocalPlacement(), base(), base(seed=9)
        p, q = lazy(x, placement), lazy(z, placement)
        before, before_view = p * 2, p + 1  # recorded earlier: keep the old values
        x0 = x.clone()
        p = p.clone() if mode == "inference" else p
        got = fn(p, q)
        assert bool(placement.materialized) == (name in IN_PLACE_SLOWLY)
        same(got, fn(x, z))
        same(p, x)
        same(q, z)
        same(before, x0 * 2)
        same(before_view, x0 + 1)


def test_augmented_assignment_keeps_dtype_and_object() -> None:
    placement = LocalPlacement()
    p = original = lazy(base(dtype=torch.float16), placement)
    p += y
    p *= 2
    assert p is original and p.dtype == torch.float16 and not placement.materialized
    same(p, (base(dtype=torch.float16).add_(y)).mul_(2))
    with pytest.raises(RuntimeError):
        lazy(base(), placement).to(torch.int32).mul_(0.5)
    with pytest.raises(RuntimeError):
        p.add_(torch.zeros(7, 3))
    with pytest.raises(LazyError):
        p.unsqueeze_(0)


def test_plain_takes_patches_in_place_and_as_out() -> None:
    placement, x = LocalPlacement(), base()
    target = y.clone()
    target += lazy(x, placement)
    assert torch.equal(target, y + x)
    target[:, :, 2:5] = lazy(x, placement)[:, :, 2:5]
    assert torch.equal(target[:, :, 2:5], x[:, :, 2:5])
    out = torch.empty_like(x)
    torch.add(lazy(x, placement), y, out=out)
    assert torch.equal(out, x + y)
    into = lazy(y, placement)
    torch.mul(x, 2, out=into)
    same(into * 1, x * 2)
    assert set(placement.materialized) == {"aten.add_.Tensor", "aten.copy_.default", "aten.add.out", "aten.mul.out"}


def test_plain_operands_may_change_before_evaluation() -> None:
    placement, x, operand, scale = LocalPlacement(), base(), y.clone(), torch.tensor(2.0)
    out = torch.cat([lazy(x, placement) * scale + operand, operand])
    operand.zero_()
    scale.zero_()
    same(out, torch.cat([x * 2 + y, y]))


def test_constants_are_plain() -> None:
    log: list[int] = []
    p = lazy(base(), LocalPlacement(), log=log)
    for made in (torch.zeros_like(p), torch.ones_like(p), torch.full_like(p, 3), torch.zeros_like(p, dtype=torch.bool)):
        assert type(made) is torch.Tensor and made.shape == p.shape
    assert torch.zeros_like(p, dtype=torch.bool).dtype == torch.bool and p.new_full((2,), 1.5).tolist() == [1.5, 1.5]
    assert torch.empty_like(p).stride() == p.stride() and not log


def test_materialized_tensor_is_its_plain_tensor() -> None:
    placement, x = LocalPlacement(), base()
    p = lazy(x, placement)
    derived = p + 1
    plain = p.materialize()
    assert p.materialize() is plain and type(p * 2) is torch.Tensor and not placement.materialized
    plain.mul_(3)
    same(p, x * 3)
    same(p * 2, x * 3 * 2)
    same(derived, x + 1)
