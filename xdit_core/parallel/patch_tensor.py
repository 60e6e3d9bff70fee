"""Patch tensors: full-size tensors whose rows along one dim are futures.

Under PipeFusion the denoiser returns such a tensor. Guidance, scheduler and callbacks compute with it as with any other
tensor, yet nothing runs until a row is asked for: pointwise operations, and those that only move data and leave the
patched dim whole, are recorded patch by patch. Any other operation *materializes* the tensor: it brings its whole value
together and runs on that, which is slower and never wrong.

Three rules keep values equal to those of eager tensors:

* Values in cells are never written to. Plain operands are copied when an operation is recorded, as their owner may
  write to them before it runs; writing to a patch tensor gives it new cells.
* A materialized patch tensor is a box around one plain tensor, which every later operation uses instead of the box.
* Writing to a view, or to a tensor that was ever viewed, materializes the tensor that was viewed; its views then are
  real views of that plain tensor. What happens depends on the program alone, not on what is still referenced, because
  materializing is collective and all ranks must agree when to do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any, cast

import torch
from torch.utils._pytree import tree_map_only

from xdit_core.errors import LazyError
from xdit_core.parallel.lazy_values import LazyValue, Placement

__all__ = ["LazyError", "LazyValue", "PatchTensor", "materialized", "patchwise"]

aten = torch.ops.aten


class PatchTensor(torch.Tensor):
    """A tensor whose rows along ``patched_dim`` are cut into patches, each a future. Made by `make` and by operations.

    Attributes:
        patched_dim: the dim that is cut, counted from the right, hence negative.
        bounds: where it is cut, ``patches + 1`` ascending numbers from 0 to its extent.
        placement: where the values live.
    """

    patched_dim: int
    bounds: tuple[int, ...]
    placement: Placement
    _meta: torch.Tensor  # the same shape, strides and dtype without data; operations run on it to learn theirs
    _cells: tuple[LazyValue, ...]  # none where the placement does not evaluate, or once there is `_whole`
    _whole: torch.Tensor | None
    _root: PatchTensor | None  # what this is a view of
    _viewed: bool

    @staticmethod
    def __new__(
        cls,
        meta: torch.Tensor,
        device: Any,
        cells: Sequence[LazyValue],
        dim: int,
        bounds: Sequence[int],
        placement: Placement,
    ) -> PatchTensor:
        """For this module; use `make`."""
        size, stride, offset = meta.shape, meta.stride(), meta.storage_offset()
        self: PatchTensor = torch.Tensor._make_wrapper_subclass(
            cls, size, strides=stride, storage_offset=offset, dtype=meta.dtype, device=device
        )
        self.patched_dim, self.bounds, self.placement = dim, tuple(bounds), placement
        self._meta, self._cells, self._whole, self._root, self._viewed = meta, tuple(cells), None, None, False
        return self

    @staticmethod
    def make(
        cells: Sequence[Callable[[], torch.Tensor] | torch.Tensor | LazyValue | None],
        *,
        shape: Sequence[int],
        dim: int,
        bounds: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        placement: Placement,
    ) -> PatchTensor:
        """A patch tensor of futures.

        Args:
            cells: for each patch its value, not to be written to any more, or what returns it: ``shape``, but
                ``bounds[m + 1] - bounds[m]`` rows along ``dim``. Ignored where the placement does not evaluate.
            bounds: where ``dim`` is cut, from 0 to its extent.

        Raises:
            LazyError: bounds, dim and cells do not fit together; or, later, a value has another shape or dtype.
        """
        ndim = len(shape)
        if not -ndim <= dim < ndim:
            raise LazyError(f"dim {dim} is not one of a tensor of shape {tuple(shape)}")
        dim = dim - ndim if dim >= 0 else dim
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != shape[dim] or any(a >= b for a, b in pairwise(bounds)):
            raise LazyError(f"bounds must ascend from 0 to {shape[dim]}, the extent of dim {dim}: {tuple(bounds)}")
        if placement.evaluates and (len(cells) != len(bounds) - 1 or any(cell is None for cell in cells)):
            raise LazyError(f"{len(bounds) - 1} patches need as many cells with values")
        made: list[LazyValue] = []
        for source, (a, b) in zip(cells if placement.evaluates else (), pairwise(bounds), strict=False):
            future = LazyValue(source) if callable(source) and not isinstance(source, torch.Tensor) else source
            made.append(LazyValue(_checked, torch.Size(_replaced(shape, dim, b - a)), dtype, future))
            if isinstance(source, torch.Tensor):
                made[-1].value()
        meta = torch.empty(tuple(shape), dtype=dtype, device="meta")
        return PatchTensor(meta, device, made, dim, bounds, placement)

    @property
    def patches(self) -> int:
        """Number of patches."""
        return len(self.bounds) - 1

    def patch(self, m: int) -> torch.Tensor:
        """The rows of patch ``m``, a plain tensor not to be written to; errors as of `rows`."""
        if not 0 <= m < self.patches:
            raise LazyError(f"there is no patch {m}; the tensor has {self.patches}")
        return self.rows(self.bounds[m], self.bounds[m + 1])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of the patched dim, a plain tensor not to be written to.

        Raises:
            LazyError: there are no such rows, or this rank never has values.
        """
        if not 0 <= start < stop <= self.bounds[-1]:
            raise LazyError(f"there are no rows {start} to {stop}; the tensor has {self.bounds[-1]}")
        if (whole := self._plain()) is not None:
            return whole.narrow(self.patched_dim, start, stop - start)
        if not self.placement.evaluates:
            raise LazyError("this rank has no values of patches; materialize the tensor on all ranks instead")
        return self._cell(start, stop).value()

    def materialize(self) -> torch.Tensor:
        """The plain tensor that this one stands for from now on; collective where the placement is."""
        root = self if self._root is None else self._root
        if root._whole is None:
            value = root.placement.materialize(root)
            if value.stride() != root.stride():  # views of it are taken by strides
                strided = torch.empty_strided(root.shape, root.stride(), dtype=root.dtype, device=root.device)
                value = strided.copy_(value)
            root._whole, root._cells = value, ()
        return cast(torch.Tensor, self._plain())

    def _plain(self) -> torch.Tensor | None:
        """The plain tensor if there is one already."""
        if self._whole is None and self._root is not None and self._root._whole is not None:
            whole = self._root._whole
            offset = whole.storage_offset() + self.storage_offset() - self._root.storage_offset()
            self._whole, self._cells = whole.as_strided(self.shape, self.stride(), offset), ()
        return self._whole

    def _cell(self, start: int, stop: int) -> LazyValue:
        """A cell of any rows."""
        parts = []
        for cell, (a, b) in zip(self._cells, pairwise(self.bounds), strict=True):
            low, high = max(start, a), min(stop, b)
            if (low, high) == (a, b):
                parts.append(cell)
            elif low < high:
                parts.append(LazyValue(torch.narrow, cell, self.patched_dim, low - a, high - low))
        return (
            parts[0]
            if len(parts) == 1
            else LazyValue(lambda dim, *rows: torch.cat(rows, dim), self.patched_dim, *parts)
        )

    def _forced(self, op: str) -> torch.Tensor:
        """The plain tensor, for an operation that cannot do without."""
        if self._plain() is None:
            self.placement.report(op)
        return self.materialize()

    # What torch does below Python's reach would look for memory that is not there.

    def numpy(self, *, force: bool = False) -> Any:
        """As of the plain tensor."""
        return self._forced("numpy").numpy(force=force)

    def tolist(self) -> Any:
        """As of the plain tensor."""
        return self._forced("tolist").tolist()

    def __reduce_ex__(self, proto: Any) -> Any:
        return self._forced("pickle").__reduce_ex__(proto)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return cast(torch.Tensor, memo.setdefault(id(self), self.clone()))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if (whole := self._plain()) is not None:
            return f"PatchTensor({whole!r})"
        shape, dim, bounds = tuple(self.shape), self.patched_dim, self.bounds
        return f"PatchTensor(shape={shape}, dtype={self.dtype}, patched_dim={dim}, bounds={bounds}, not evaluated)"

    # The default would wrap plain results as this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.inplace_view in func.tags:
            raise LazyError(f"a patch tensor cannot change its shape in place ({func}); use the operation without _")
        if func in _NEED_NO_VALUES:
            return func(*tree_map_only(PatchTensor, _blank, args), **kwargs)
        out = None
        if not _any_lazy([*args, *kwargs.values()]):
            pass
        elif func._schema.is_mutable:
            out = _write(func, args, kwargs)
        elif (rule := _RULES.get(func)) is not None:
            out = rule(func, args, kwargs)
        elif _is_pointwise(func):
            out = _pointwise(func, args, kwargs)
        if out is None and func._can_decompose():  # in inference mode composite operations arrive in one piece
            out = func.decompose(*args, **kwargs)
        if out is not None and out is not NotImplemented:
            return out
        args, kwargs = tree_map_only(PatchTensor, lambda x: x._forced(str(func)), (args, kwargs))
        return func(*args, **kwargs)


def patchwise(fn: Callable[..., torch.Tensor], x: torch.Tensor, *more: Any) -> torch.Tensor:
    """Return ``fn(x, *more)``; if ``x`` is a patch tensor, ``fn`` is called for each patch when it is needed.

    Args:
        fn: works on each row on its own and keeps their number; other dims may change. Must not write to its
            arguments. It is first called with tensors of no rows, to learn the shape, and later without autocast.
        more: passed on; patch tensors are passed patch by patch, anything else as it is.

    Raises:
        LazyError: ``fn`` changes the number of rows, or the patch tensors do not fit together.
    """
    operands = [_open(a) for a in (x, *more)]
    if not isinstance(operands[0], PatchTensor):
        return fn(*materialized(operands))
    out = _record(fn, operands, cut=False)
    if out is None:
        raise LazyError("a function that works patch by patch must keep the patched dim, and all its tensors share it")
    return out


def materialized(x: Any) -> Any:
    """Return ``x`` with each patch tensor in it (also in lists, tuples and dicts) replaced by its plain tensor."""
    return tree_map_only(PatchTensor, PatchTensor.materialize, x)


# Recording. Operands are open: patch tensors among them are not materialized, all other tensors are plain.


def _record(
    call: Any, operands: Sequence[Any], out_dim: Any = None, *, meta: Any = None, device: Any = None, cut: bool = True
) -> PatchTensor | None:
    """The patch tensor of ``call(*operands)``, or None if it cannot be computed patch by patch.

    Args:
        out_dim: the patched dim of the result, if not that of the operands.
        meta: what the call returns of meta tensors, if known.
        cut: give each patch its rows of plain tensors that have the patched dim.
    """
    lazy = [a for a in operands if isinstance(a, PatchTensor)]
    lead, dim, extent, placement = lazy[0], lazy[0].patched_dim, lazy[0].bounds[-1], lazy[0].placement
    out_dim = dim if out_dim is None else out_dim
    meta = _infer(call, operands, lead) if meta is None else meta
    if meta is None or meta.ndim < -out_dim or meta.shape[out_dim] != extent:
        return None
    if any((a.patched_dim, a.bounds[-1], a.placement) != (dim, extent, placement) for a in lazy):
        return None
    # At the union no row waits for more than it needs, and pieces do not multiply: cuts are few and recur.
    bounds = lead.bounds if len(lazy) == 1 else sorted({b for a in lazy for b in a.bounds})
    cells: list[LazyValue] = []
    if placement.evaluates:
        owned = [a.clone() if isinstance(a, torch.Tensor) and not isinstance(a, PatchTensor) else a for a in operands]
        for start, stop in pairwise(bounds):
            inputs = [_rows(a, lead, start, stop) if cut or isinstance(a, PatchTensor) else a for a in owned]
            cells.append(LazyValue(call, *inputs))
    return PatchTensor(meta, device or lead.device, cells, out_dim, bounds, placement)


def _infer(call: Callable[..., Any], operands: Sequence[Any], lead: PatchTensor) -> torch.Tensor | None:
    """A meta tensor like the result of ``call(*operands)``, or None if there is no telling.

    Kernels of meta tensors take 100 us. Those of tensors with no rows take 2 us and know shapes and dtypes as well;
    strides follow if everything is contiguous.
    """
    if all(x.is_contiguous() if isinstance(x, torch.Tensor) else type(x) is not torch.memory_format for x in operands):
        try:
            empty = call(*[_no_rows(x, lead) for x in operands])
            if isinstance(empty, torch.Tensor) and list(empty.shape).count(0) == 1:
                return torch.empty([n or lead.bounds[-1] for n in empty.shape], dtype=empty.dtype, device="meta")
        except RuntimeError:  # no such kernel on the CPU, or the operation is wrong, which is better said below
            pass
    try:
        meta = call(*map(_to_meta, operands))
    except NotImplementedError:
        return None
    return meta if isinstance(meta, torch.Tensor) else None


def _rows(x: Any, lead: PatchTensor, start: int, stop: int) -> Any:
    """Return the part of an operand that a patch needs."""
    if isinstance(x, PatchTensor):
        return x._cell(start, stop)
    return x.narrow(lead.patched_dim, start, stop - start) if _has_rows(x, lead) else x


def _has_rows(x: Any, lead: PatchTensor) -> bool:
    """Whether a tensor has the patched dim."""
    return isinstance(x, torch.Tensor) and x.ndim >= -lead.patched_dim and x.shape[lead.patched_dim] == lead.bounds[-1]


def _no_rows(x: Any, lead: PatchTensor) -> Any:
    """For a tensor one on the CPU with the same metadata, but no rows if it has the patched dim."""
    if not isinstance(x, torch.Tensor):
        return torch.device("cpu") if isinstance(x, torch.device) else x
    return torch.empty(_replaced(x.shape, lead.patched_dim, 0) if _has_rows(x, lead) else x.shape, dtype=x.dtype)


def _to_meta(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x._meta if isinstance(x, PatchTensor) else x.to("meta")
    return torch.device("meta") if isinstance(x, torch.device) else x


def _blank(x: PatchTensor) -> torch.Tensor:
    """A plain tensor with the metadata of ``x`` and no particular values."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _open(x: Any) -> Any:
    """The plain tensor in place of a materialized patch tensor."""
    return x if not isinstance(x, PatchTensor) or (whole := x._plain()) is None else whole


def _any_lazy(values: Any) -> bool:
    """Whether there is a patch tensor that is not materialized, also in nested sequences."""
    for x in values:
        if isinstance(x, PatchTensor):
            if x._plain() is None:
                return True
        elif isinstance(x, (list, tuple)) and _any_lazy(x):
            return True
    return False


def _is_pointwise(func: Any) -> bool:
    """Noise drawn patch by patch would be other noise; an alias has to know what it is an alias of."""
    tags = func.tags
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags and not func.is_view


def _replaced(sizes: Sequence[int], dim: int, size: int) -> list[int]:
    """Sizes with that of one dim replaced."""
    result = list(sizes)
    result[dim] = size
    return result


def _checked(shape: torch.Size, dtype: torch.dtype, value: torch.Tensor) -> torch.Tensor:
    if value.shape != shape or value.dtype != dtype:
        raise LazyError(f"a patch should be {dtype} {tuple(shape)} and is {value.dtype} {tuple(value.shape)}")
    return value


# Rules: (func, args, kwargs) -> the result, or None if the operation has to materialize its operands.


def _pointwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Element by element, with broadcasting."""
    operands, count = [_open(a) for a in (*args, *kwargs.values())], len(args)

    def with_names(*values: Any) -> Any:
        return func(*values[:count], **dict(zip(kwargs, values[count:], strict=True)))

    return _record(with_names if kwargs else func, operands, device=kwargs.get("device"))


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operations that only change how the elements of one tensor are arranged, with one result or many.

    Where the patched dim ends up is read off a probe, a meta tensor in which only that dim has a stride, 1: strides
    and offset of its view say which row of the operand an element comes from, whatever the operation is.
    """
    x, rest = args[0], args[1:]
    dim, left = x.patched_dim, x.ndim + x.patched_dim
    probe = torch.empty_strided(x.shape, [int(d == left) for d in range(x.ndim)], device="meta")
    metas = func(x._meta, *rest, **kwargs)
    try:
        traces = func(probe, *rest, **kwargs)
    except RuntimeError:  # it would merge the patched dim with another
        return None
    many, results = isinstance(metas, (list, tuple)), []
    for i, (meta, trace) in enumerate(zip(metas, traces, strict=True) if many else [(metas, traces)]):
        strides = [s if n > 1 else 0 for n, s in zip(trace.shape, trace.stride(), strict=True)]
        out: PatchTensor | None = None
        if func in _RANGES and (rows := trace.shape[left]) > 0 and list(meta.shape) == _replaced(x.shape, dim, rows):
            if strides[left] in (0, 1):  # rows of x and nothing else
                start = trace.storage_offset()
                bounds = [0, *(b - start for b in x.bounds if start < b < start + rows), rows]
                cells = [x._cell(start + a, start + b) for a, b in pairwise(bounds)] if x.placement.evaluates else []
                out = PatchTensor(meta, x.device, cells, dim, bounds, x.placement)
        elif sorted(strides)[-1:] == [1] and strides.count(0) == len(strides) - 1:
            place, resize = strides.index(1), _RESIZES.get(func)
            again = partial(_again, func, rest, kwargs, i if many else None)
            call = again if resize is None else partial(_resized, resize, meta.shape, place, dim)
            out = _record(call, [x], place - meta.ndim, meta=meta)
        if out is None:
            return None
        results.append(out)
    root = x if x._root is None else x._root
    root._viewed = True
    for out in results:
        out._root = root
    return results if many else results[0]


def _again(func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any], index: int | None, value: torch.Tensor) -> Any:
    out = func(value, *rest, **kwargs)
    return out if index is None else out[index]


def _resized(resize: Any, shape: torch.Size, position: int, dim: int, value: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, resize(value, _replaced(shape, position, value.shape[dim])))


def _joined(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``cat`` and ``stack`` along any dim but the patched one."""
    tensors = [_open(a) for a in args[0]]
    along = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    lead, stacks = next(a for a in tensors if isinstance(a, PatchTensor)), func is aten.stack.default
    along -= (lead.ndim + stacks) * (along >= 0)
    dim = lead.patched_dim - (stacks and along >= lead.patched_dim)  # a new dim to the right moves it
    return None if along == dim else _record(lambda *values: func(values, along), tensors, dim)


def _repeat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``repeat`` of any dim but the patched one."""
    dim, times = args[0].patched_dim, args[1]
    return _record(func, args) if len(times) >= -dim and times[dim] == 1 else None


def _write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation in place: run it out of place, and let the tensor take over the cells of the result."""
    x, name = args[0] if args else None, func._schema.name.removeprefix("aten::")
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if not isinstance(x, PatchTensor) or not name.endswith("_") or written != ["self"]:
        return None
    if x._plain() is not None or x._root is not None or x._viewed:
        return None
    rest, out = [_open(a) for a in args[1:]], None
    if name in _OVERWRITES and not _any_lazy(rest):
        value = func(_blank(x), *rest, **kwargs)
        pieces = [value.narrow(x.patched_dim, a, b - a) for a, b in pairwise(x.bounds)]
        x._cells = tuple(LazyValue(torch.detach, piece) for piece in pieces if x._cells)
        return x
    functional = getattr(getattr(aten, name[:-1], None), func._overloadname, None)
    if name == "copy_":
        out = rest[0].to(x.device, x.dtype)
    elif functional is not None and _is_pointwise(functional):
        out = _pointwise(functional, args, kwargs)
    if out is None or out.patched_dim != x.patched_dim:
        return None
    if out.shape != x.shape or not torch.can_cast(out.dtype, x.dtype):
        return None  # the operation itself says what is wrong
    out = out.to(x.dtype)
    x._cells, x.bounds = out._cells, out.bounds
    return x


def _overloads(*names: str) -> Iterator[Any]:
    """Every overload of these operations that this torch has, but for those that write to a tensor."""
    for packet in (getattr(aten, name) for name in names if hasattr(aten, name)):
        yield from (f for f in (getattr(packet, o) for o in packet.overloads()) if not f._schema.is_mutable)


# Operations that look at nothing but shape, dtype and device. Noise is drawn at once, as for an eager tensor.
_LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like")
_NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros")
_NEED_NO_VALUES = frozenset([*_overloads(*_LIKE, *_NEW, "is_same_size"), aten.bernoulli.p])
# Operations in place that do not depend on what was there before.
_OVERWRITES = frozenset(["copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "exponential_", "bernoulli_"])
# Views that take a range of one dim.
_RANGES = frozenset([aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default])
# Views with sizes that patches do not share, and what has the same effect on a patch of any strides.
_RESIZES: MappingProxyType[Any, Any] = MappingProxyType(
    dict.fromkeys([*_overloads("_unsafe_view", "squeeze", "unsqueeze"), aten.view.default], torch.reshape)
    | {aten.expand.default: torch.Tensor.expand}
)
_MOVES = (*_overloads("alias", "detach", "lift_fresh", "permute", "t"), aten.select.int, aten.unbind.int)
_RULES: MappingProxyType[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = MappingProxyType(
    dict.fromkeys([*_MOVES, *_RANGES, *_RESIZES, aten.transpose.int], _view)
    | {aten.cat.default: _joined, aten.stack.default: _joined}
    | {aten.repeat.default: _repeat, aten._to_copy.default: _pointwise}
)
