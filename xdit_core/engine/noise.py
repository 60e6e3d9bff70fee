"""Give each picture its own stream of random numbers, independent of its rank and of its batch.

A pipeline starts from noise of a generator for each picture. Some schedulers need more random numbers in every step,
and take them for the whole batch from torch's default generator. While such a scheduler steps, these numbers are drawn
picture by picture, each with the state that the default generator would have in a run of that picture alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from xdit_core.errors import UnsupportedCall

# functions that make random tensors: of a shape, or like another tensor
_OF_SHAPE: Mapping[Any, Callable[..., torch.Tensor]] = MappingProxyType(
    {torch.randn: torch.randn, torch.rand: torch.rand}
)
_LIKE: Mapping[Any, Callable[..., torch.Tensor]] = MappingProxyType(
    {torch.randn_like: torch.randn, torch.rand_like: torch.rand}
)


class PictureStreams(TorchFunctionMode):
    """Surround each step of a scheduler: random numbers of each picture come from its own stream.

    Args:
        seeds: seeds of the pictures of the batch, in order.
        device: device of the latents.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        super().__init__()
        self._cuda = device if device.type == "cuda" else None
        before = self._state()
        self._streams = []
        for seed in seeds:
            torch.manual_seed(seed)
            self._streams.append(self._state())
        self._restore(before)
        self._before: Any = None

    def __enter__(self) -> PictureStreams:
        self._before = self._state()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        moved = any(not torch.equal(a, b) for a, b in zip(self._state(), self._before, strict=True))
        if moved and error[0] is None:
            raise UnsupportedCall(
                f"the scheduler draws random numbers for {len(self._streams)} pictures at once in a way that cannot be "
                "told apart by picture; ask for images=1 and give each picture a request of its own."
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        draw = _OF_SHAPE.get(func) or _LIKE.get(func)
        if draw is None or given.get("generator") is not None:
            return func(*args, **given)
        if func in _LIKE:
            like, shape = args[0], tuple(args[0].shape)
            given = {
                "dtype": like.dtype,
                "device": like.device,
                **{k: v for k, v in given.items() if k != "memory_format"},
            }
        else:
            size = given.pop("size", None) if "size" in given else args[0] if len(args) == 1 else args
            shape = (size,) if isinstance(size, int) else tuple(size)
        if not shape or shape[0] != len(self._streams):
            return func(
                *args, **(kwargs or {})
            )  # these numbers are not one row a picture, which is noticed at the end of the step
        before, pictures = self._state(), []
        for i, stream in enumerate(self._streams):
            self._restore(stream)
            pictures.append(draw((1, *shape[1:]), **given))
            self._streams[i] = self._state()
        self._restore(before)
        return torch.cat(pictures)

    def _state(self) -> tuple[torch.Tensor, ...]:
        """Return the state of the default generators that a scheduler may use."""
        cuda = () if self._cuda is None else (torch.cuda.get_rng_state(self._cuda),)
        return (torch.get_rng_state(), *cuda)

    def _restore(self, state: tuple[torch.Tensor, ...]) -> None:
        torch.set_rng_state(state[0])
        if self._cuda is not None:
            torch.cuda.set_rng_state(state[1], self._cuda)
