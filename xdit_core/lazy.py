"""The patch tensor: a tensor of full shape whose rows are futures.

Under PipeFusion ``transformer(...)`` returns one. Pointwise operations, and the few structural ones that leave the patched dim
alone, are mapped over the patches and run when a patch is asked for; any other operation brings the whole tensor together first
(slower, never wrong). Thus guidance, scheduler and callbacks of the unmodified pipeline run patch by patch, at the moment when the next step asks for that patch.

A patched dim is counted from the right (``dim`` is negative), so that broadcasting and new leading dims leave it alone.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from xdit_core.errors import LazyError

aten = torch.ops.aten
Bounds = tuple[int, ...]


class Cell:
    """One future: computed at most once, from the values of other cells; then it forgets what it was computed from."""

    __slots__ = ("_compute", "_needs", "_value")

    def __init__(self, compute: Callable[..., torch.Tensor] | None, needs: Sequence[Cell] = (), value: Any = None) -> None:
        self._compute, self._needs, self._value = compute, tuple(needs), value

    def value(self) -> torch.Tensor:
        """The rows; evaluates without recursion, however long the chain."""
        stack: list[Cell] = [self]
        while stack:
            cell = stack[-1]
            waiting = [need for need in cell._needs if need._compute is not None]
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            if cell._compute is not None:
                with torch.no_grad():
                    cell._value = cell._compute(*[need._value for need in cell._needs])
                cell._compute, cell._needs = None, ()
        return self._value  # type: ignore[no-any-return]


class PatchWorld:
    """Where the values of patches live. This one: every patch can be computed here.

    Args:
        evaluates: False on ranks that never compute a patch; their tensors hold shapes only.
        materialized: how often each operation needed a whole tensor.
    """

    evaluates: bool = True

    def __init__(self) -> None:
        self.materialized: Counter[str] = Counter()

    def materialize(self, tensor: PatchTensor) -> torch.Tensor:
        """The plain tensor; where patches live on other ranks too, this is collective."""
        return torch.cat([tensor.patch(m) for m in range(tensor.patches)], dim=tensor.patch_dim)

    def report(self, op: str) -> None:
        """An operation needs a whole tensor."""
        self.materialized[op] += 1


class PatchTensor(torch.Tensor):
    """See the module. Made by ``make``; never constructed by hand."""

    _cells: tuple[Cell, ...]
    _whole: torch.Tensor | None
    _base_of_view: PatchTensor | None
    _views: weakref.WeakSet[PatchTensor]
    bounds: Bounds
    patch_dim: int
    world: PatchWorld

    @staticmethod
    def make(
        cells: Sequence[Any],
        *,
        shape: Sequence[int],
        dim: int,
        bounds: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        world: PatchWorld,
    ) -> PatchTensor:
        """A patch tensor.

        Args:
            cells: for each patch a tensor, a callable without arguments, or a ``Cell``; ignored where ``world`` does not evaluate.
            shape: full shape.
            dim: the patched dim; counted from the right in ``patch_dim``.
            bounds: ``patches + 1`` ascending numbers from 0 to the extent of the patched dim.
            world: where the values live.

        Raises:
            LazyError: the bounds do not fit.
        """
        shape, bounds = torch.Size(shape), tuple(bounds)
        dim = dim - len(shape) if dim >= 0 else dim
        ascending = all(a < b for a, b in pairwise(bounds))
        if len(bounds) != len(cells) + 1 or bounds[0] != 0 or bounds[-1] != shape[dim] or not ascending:
            raise LazyError(f"bounds {bounds} do not cut dim {dim} of {tuple(shape)} into {len(cells)} patches")
        new: PatchTensor = torch.Tensor._make_wrapper_subclass(PatchTensor, shape, dtype=dtype, device=device)
        new._cells = tuple(as_cell(c) for c in cells) if world.evaluates else ()
        new.bounds, new.patch_dim, new.world = bounds, dim, world
        new._whole, new._base_of_view, new._views = None, None, weakref.WeakSet()
        return new

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def patches(self) -> int:
        """Number of patches."""
        return len(self.bounds) - 1

    def patch(self, m: int) -> torch.Tensor:
        """The rows of patch ``m`` as a plain tensor; waits for them.

        Raises:
            LazyError: this rank does not hold the values.
        """
        return self.rows(self.bounds[m], self.bounds[m + 1])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Any range of rows as a plain tensor, however the patches are cut."""
        if self._whole is not None:
            return self._whole.narrow(self.patch_dim, start, stop - start)
        if not self.world.evaluates:
            raise LazyError("this rank does not hold the values of a patch tensor; read it on the first stage, or on all ranks")
        parts = []
        for cell, (a, b) in zip(self._cells, pairwise(self.bounds), strict=True):
            low, high = max(a, start), min(b, stop)
            if low < high:
                value = cell.value()
                parts.append(value if (low, high) == (a, b) else value.narrow(self.patch_dim, low - a, high - low))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.patch_dim)

    def materialize(self) -> torch.Tensor:
        """The plain tensor, through the world; kept, so that a second time costs nothing."""
        if self._whole is None:
            self._whole = self.world.materialize(self)
            if self.world.evaluates:
                self._cells = tuple(as_cell(p) for p in cut(self._whole, self.patch_dim, self.bounds))
        return self._whole

    def cells(self, bounds: Bounds) -> tuple[Cell, ...]:
        """The futures for a finer cut."""
        if bounds == self.bounds:
            return self._cells
        return tuple(self._finer(a, b) for a, b in pairwise(bounds))

    def _finer(self, a: int, b: int) -> Cell:
        m = max(i for i, low in enumerate(self.bounds) if low <= a)
        low, dim = self.bounds[m], self.patch_dim
        return Cell(lambda rows: rows.narrow(dim, a - low, b - a), (self._cells[m],))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Shape and cut; never waits for values."""
        return f"PatchTensor(shape={tuple(self.shape)}, dtype={self.dtype}, dim={self.patch_dim}, bounds={self.bounds})"

    def numpy(self, *, force: bool = False) -> Any:
        """The whole tensor as an array."""
        return self.materialize().numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.materialize().__array__(*args, **kwargs)

    def tolist(self) -> Any:
        """The whole tensor as lists."""
        return self.materialize().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.materialize().clone()


def as_cell(x: Any) -> Cell:
    """A tensor, callable or cell as a cell."""
    if isinstance(x, Cell):
        return x
    return Cell(None, value=x) if isinstance(x, torch.Tensor) else Cell(x)


def cut(x: torch.Tensor, dim: int, bounds: Bounds) -> list[torch.Tensor]:
    """The patches of a plain tensor."""
    return [x.narrow(dim, a, b - a) for a, b in pairwise(bounds)]


def materialized(x: Any) -> Any:
    """``x`` with every patch tensor in it (lists, tuples, dicts) made plain."""
    return tree_map(lambda t: t.materialize() if isinstance(t, PatchTensor) else t, x)


def patchwise(fn: Callable[..., torch.Tensor], x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
    """Apply ``fn`` to each patch when it is asked for, or at once to a plain tensor.

    Args:
        fn: keeps the extent of the patched dim, treats rows alike, and may change other dims; it is tried on the meta device for its shape.
        x: decides whether and how the result is cut.
        more: further tensors with the same rows.
    """
    if not isinstance(x, PatchTensor):
        return fn(x, *more)
    leaves: list[Any] = [x, *more]
    shape = fn(*[meta(t) for t in leaves])
    return mapped(lambda *values: fn(*values), leaves, shape, x.patch_dim, x.device)


def meta(x: Any) -> Any:
    """A tensor without values."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, torch.Tensor) else x


def mapped(
    fn: Callable[..., torch.Tensor], leaves: Sequence[Any], out: torch.Tensor, dim: int, device: torch.device
) -> PatchTensor:
    """The lazy ``fn(*leaves)``, patch by patch.

    Args:
        leaves: tensors and other values; those with the full extent at the patched dim are cut, others go whole.
        out: shape and dtype of the result.
        dim: patched dim of the result.
    """
    patched = [t for t in leaves if isinstance(t, PatchTensor)]
    world, extent = patched[0].world, patched[0].shape[patched[0].patch_dim]
    bounds = tuple(sorted({b for t in patched for b in t.bounds}))
    new = PatchTensor.make(
        (None,) * (len(bounds) - 1) if not world.evaluates else [Cell(None)] * (len(bounds) - 1),
        shape=out.shape,
        dim=dim,
        bounds=bounds,
        dtype=out.dtype,
        device=device,
        world=world,
    )
    if not world.evaluates:
        return new
    position = patched[0].patch_dim
    sources: list[Any] = []
    constants: list[Any] = []
    checks: list[Callable[[], None]] = []
    for t in leaves:
        plain = isinstance(t, torch.Tensor) and not isinstance(t, PatchTensor)
        if plain:
            t, check = held(t)
            checks.append(check)
        constants.append(t)
        if isinstance(t, PatchTensor):
            sources.append(t.cells(bounds))
            constants[-1] = None
        elif plain and t.dim() >= -position and t.shape[position] == extent and extent > 1:
            sources.append(tuple(Cell(None, value=p) for p in cut(t, position, bounds)))
            constants[-1] = None
        else:
            sources.append(None)
    lazy = tuple(i for i, s in enumerate(sources) if s is not None)

    def compute(*values: torch.Tensor) -> torch.Tensor:
        for check in checks:
            check()
        filled = list(constants)
        for i, value in zip(lazy, values, strict=True):
            filled[i] = value
        return fn(*filled)

    new._cells = tuple(Cell(compute, [sources[i][m] for i in lazy]) for m in range(len(bounds) - 1))
    return new


def held(t: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
    """A plain operand that is read later, and a check that nobody wrote to it meanwhile. Small ones are copied.

    Raises:
        LazyError: (the check) it was written to; plain torch would have used the old values.
    """
    if t.numel() <= 4096 or t.is_inference():
        return t.clone(), lambda: None
    version = t._version

    def check() -> None:
        if t._version != version:
            raise LazyError("a tensor was written to while patches computed from it are still to come; write to a clone of it")

    return t, check


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation with a patch tensor among its arguments."""
    packet = func.overloadpacket
    if func._schema.is_mutable:
        return in_place(func, args, kwargs)
    if packet in LIKE:
        return func(stand_in(args[0]), *args[1:], **kwargs)
    rule = STRUCTURAL.get(packet)
    if rule is not None:
        result = rule(func, args, kwargs)
    elif torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags:
        result = pointwise(func, args, kwargs)
    else:
        result = NotImplemented
    if result is NotImplemented:
        return whole(func, args, kwargs)
    if func.is_view:
        for view in result if isinstance(result, list | tuple) else (result,):
            view._base_of_view = args[0]
            args[0]._views.add(view)
    return result


def whole(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on plain tensors: everybody waits."""
    for t in tree_flatten((args, kwargs))[0]:
        if isinstance(t, PatchTensor) and t._whole is None:
            t.world.report(func.overloadpacket.__name__)
    return func(*materialized(args), **materialized(kwargs))


def stand_in(x: Any) -> Any:
    """A plain tensor of the same shape, for operations that look at nothing else."""
    if not isinstance(x, PatchTensor):
        return x
    return torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape)


def in_place(func: Any, args: Any, kwargs: Any) -> Any:
    """``x += y`` drops what it gets back, so the tensor itself takes over the new futures.

    Raises:
        LazyError: the tensor shares memory with another in plain torch, which futures cannot imitate.
    """
    target, packet = args[0] if args else None, func.overloadpacket
    if not isinstance(target, PatchTensor) or "out" in kwargs:
        return whole(func, args, kwargs)  # into a plain tensor
    if target._base_of_view is not None or len(target._views):
        raise LazyError(
            f"{packet.__name__} writes into a tensor that shares its memory with another while its patches are still to come; "
            "clone it first"
        )
    name = packet.__name__
    if name == "copy_":
        new = torch.empty_like(target).copy_(args[1]) if not isinstance(args[1], PatchTensor) else args[1].to(target.dtype)
        new = new.expand(target.shape) if new.shape != target.shape else new
    elif name in ("zero_", "fill_"):
        new = torch.full(target.shape, args[1] if name == "fill_" else 0, dtype=target.dtype, device=target.device)
    else:
        functional = getattr(getattr(aten, name.rstrip("_"), None), func._overloadname, None)
        if functional is None or name.startswith(("normal", "uniform", "bernoulli", "random", "exponential")):
            new = func(target.materialize().clone(), *materialized(args[1:]), **materialized(kwargs))
        else:
            new = functional(*args, **kwargs)
    if new.dtype != target.dtype:
        new = new.to(target.dtype)
    if isinstance(new, PatchTensor):
        target._cells, target.bounds, target._whole = new._cells, new.bounds, new._whole
    else:
        target._whole = new
        if target.world.evaluates:
            target._cells = tuple(as_cell(p) for p in cut(new, target.patch_dim, target.bounds))
    return target


def pointwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Row by row the same; broadcasting included."""
    leaves, spec = tree_flatten((args, kwargs))
    patched = [t for t in leaves if isinstance(t, PatchTensor)]
    dim, extent = patched[0].patch_dim, patched[0].shape[patched[0].patch_dim]
    if any(t.patch_dim != dim or t.shape[dim] != extent for t in patched):
        return NotImplemented
    device = next((x for x in leaves if isinstance(x, torch.device)), patched[0].device)
    sizes = [None if isinstance(x, torch.device) else meta(x) for x in leaves]
    margs, mkwargs = tree_unflatten(sizes, spec)
    out = func(*margs, **mkwargs)
    if not isinstance(out, torch.Tensor) or out.dim() < -dim or out.shape[dim] != extent:
        return NotImplemented

    def fn(*values: Any) -> torch.Tensor:
        a, k = tree_unflatten(list(values), spec)
        return func(*a, **k)  # type: ignore[no-any-return]

    return mapped(fn, leaves, out, dim, device)


# Structural rules: (func, args, kwargs) -> result, or NotImplemented to bring the whole tensor together.


def negative(dim: int, ndim: int) -> int:
    """A dim counted from the right."""
    return dim - ndim if dim >= 0 else dim


def unary(func: Any, x: PatchTensor, change: Callable[[int], tuple[Any, ...]], kwargs: Any, dim: int, pick: Any = None) -> Any:
    """``func(x, *change(extent), **kwargs)`` for each patch; ``change`` gets the extent of the patch."""

    def fn(rows: torch.Tensor) -> torch.Tensor:
        out = func(rows, *change(rows.shape[position]), **kwargs)
        return out if pick is None else out[pick]  # type: ignore[no-any-return]

    position = x.patch_dim
    return mapped(fn, (x,), fn(meta(x)), dim, x.device)


def several(func: Any, args: Any, kwargs: Any) -> Any:
    """split, unbind: one result for each piece."""
    x, rest = args[0], args[1:]
    where = kwargs.get("dim", rest[-1] if func.overloadpacket is aten.unbind and rest else (rest[1] if len(rest) > 1 else 0))
    where = negative(where, x.dim())
    if where == x.patch_dim:
        return NotImplemented
    gone = func.overloadpacket is aten.unbind
    dim = x.patch_dim + 1 if gone and where > x.patch_dim else x.patch_dim
    count = len(func(meta(x), *rest, **kwargs))
    return [unary(func, x, lambda _: rest, kwargs, dim, i) for i in range(count)]


def along(func: Any, args: Any, kwargs: Any) -> Any:
    """slice and select on another dim."""
    x, rest = args[0], args[1:]
    where = negative(rest[0] if rest else kwargs.get("dim", 0), x.dim())
    if where == x.patch_dim:
        return NotImplemented
    gone = func.overloadpacket is aten.select
    dim = x.patch_dim + 1 if gone and where > x.patch_dim else x.patch_dim
    return unary(func, x, lambda _: rest, kwargs, dim)


def new_dim(func: Any, args: Any, kwargs: Any) -> Any:
    """unsqueeze."""
    x, where = args
    where = negative(where, x.dim() + 1)
    return unary(func, x, lambda _: (where,), kwargs, x.patch_dim - 1 if where > x.patch_dim - 1 else x.patch_dim)


def lost_dim(func: Any, args: Any, kwargs: Any) -> Any:
    """squeeze of named dims."""
    x = args[0]
    if len(args) < 2:
        return NotImplemented
    asked = args[1] if isinstance(args[1], list | tuple) else (args[1],)
    wanted = {negative(d, x.dim()) for d in asked}
    gone = [d for d in wanted if x.shape[d] == 1]
    if x.patch_dim in wanted:
        return NotImplemented
    rest = ([d for d in gone],) if gone else ([],)
    return unary(aten.squeeze.dims, x, lambda _: rest, kwargs, x.patch_dim + sum(d > x.patch_dim for d in gone))


def moved(func: Any, args: Any, kwargs: Any) -> Any:
    """permute and transpose: the patched dim goes along."""
    x, n = args[0], args[0].dim()
    order = list(range(n))
    if func.overloadpacket is aten.permute:
        order = [d % n for d in args[1]]
    elif func.overloadpacket is aten.transpose:
        a, b = args[1] % n, args[2] % n
        order[a], order[b] = order[b], order[a]
    else:
        order.reverse()
    return unary(aten.permute.default, x, lambda _: (order,), {}, order.index(x.patch_dim % n) - n)


def expanded(func: Any, args: Any, kwargs: Any) -> Any:
    """expand: new leading dims, or the batch."""
    x, sizes = args[0], list(args[1])
    if sizes[x.patch_dim] not in (-1, x.shape[x.patch_dim]):
        return NotImplemented
    sizes[x.patch_dim] = -1
    return unary(func, x, lambda _: (sizes,), kwargs, x.patch_dim)


def repeated(func: Any, args: Any, kwargs: Any) -> Any:
    """repeat along other dims."""
    x, times = args[0], args[1]
    return NotImplemented if times[x.patch_dim] != 1 else unary(func, x, lambda _: (times,), kwargs, x.patch_dim)


def reshaped(func: Any, args: Any, kwargs: Any) -> Any:
    """view: where the patched dim stays a dim of its own."""
    x = args[0]
    shape = list(func(meta(x), *args[1:]).shape)
    extent, before, behind = x.shape[x.patch_dim], x.shape[: x.patch_dim].numel(), x.shape[x.patch_dim :].numel()
    for j, size in enumerate(shape):
        if size == extent and torch.Size(shape[:j]).numel() == before and torch.Size(shape[j:]).numel() == behind:
            return unary(
                aten.reshape.default, x, lambda rows, j=j: ([*shape[:j], rows, *shape[j + 1 :]],), {}, j - len(shape)
            )
    return NotImplemented


def joined(func: Any, args: Any, kwargs: Any) -> Any:
    """cat and stack on another dim."""
    tensors = list(args[0])
    where = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = next(t for t in tensors if isinstance(t, PatchTensor))
    new = func.overloadpacket is aten.stack
    where = negative(where, first.dim() + new)
    same = all(
        t.shape[first.patch_dim] == first.shape[first.patch_dim]
        and (not isinstance(t, PatchTensor) or t.patch_dim == first.patch_dim)
        for t in tensors
        if t.dim() == first.dim()
    )
    if not same or any(t.dim() != first.dim() for t in tensors) or (where == first.patch_dim and not new):
        return NotImplemented
    dim = first.patch_dim - 1 if new and where > first.patch_dim - 1 else first.patch_dim

    def fn(*values: torch.Tensor) -> torch.Tensor:
        return func(list(values), where)  # type: ignore[no-any-return]

    return mapped(fn, tensors, fn(*[meta(t) for t in tensors]), dim, first.device)


STRUCTURAL: Mapping[Any, Callable[[Any, Any, Any], Any]] = MappingProxyType(
    {
        **dict.fromkeys((aten.clone, aten.detach, aten.alias, aten._to_copy, aten.lift_fresh, aten.copy), pointwise),
        **dict.fromkeys((aten.split, aten.split_with_sizes, aten.unbind), several),
        **dict.fromkeys((aten.slice, aten.select), along),
        **dict.fromkeys((aten.permute, aten.transpose, aten.t), moved),
        **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias), reshaped),
        **dict.fromkeys((aten.cat, aten.stack), joined),
        aten.squeeze: lost_dim,
        aten.unsqueeze: new_dim,
        aten.expand: expanded,
        aten.repeat: repeated,
    }
)
LIKE = frozenset(
    (
        *(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like),
        *(aten.rand_like, aten.randn_like, aten.randint_like),
        *(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty),
    )
)
