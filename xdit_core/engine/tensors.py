"""Read the tensors of a denoiser from the weight files of a folder, or from a module in memory; and copy modules
without their values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from xdit_core.checkpoints.weights import weight_files


class Tensors(Protocol):
    """Named tensors that are read one by one, whole or in part."""

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""

    def computed(self) -> Iterable[str]:
        """Return the names of buffers that are in no checkpoint and are taken over nevertheless."""

    def origin(self, name: str) -> str:
        """Return the file or module that holds a tensor, for messages."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""

    def read(self, name: str, where: tuple[slice, ...] | None = None) -> torch.Tensor:
        """Return a tensor, or a slice of it. It may share memory with its owner, so it must not be written to."""

    def dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        """Return the dtype that a tensor gets on this rank."""


class FileTensors:
    """The tensors of safetensors files, in the precision that diffusers' ``from_pretrained(dtype=...)`` gives them.

    Args:
        folder: of a diffusers component.
        dtype: of those that are floating point numbers.
        float32: names of modules that stay in float32.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, float32: Iterable[str] = ()) -> None:
        from safetensors import safe_open

        self._dtype, self._float32 = dtype, frozenset(float32)
        self._files, self._holders = ExitStack(), dict[str, tuple[Path, Any]]()
        for file in weight_files(folder, "diffusers"):
            opened = self._files.enter_context(safe_open(file, framework="pt"))
            self._holders |= dict.fromkeys(opened.keys(), (file, opened))

    def __enter__(self) -> FileTensors:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return self._holders.keys()

    def computed(self) -> Iterable[str]:
        """None: the constructor has made them."""
        return ()

    def origin(self, name: str) -> str:
        """The file."""
        return str(self._holders[name][0])

    def shape(self, name: str) -> tuple[int, ...]:
        """From the file's header."""
        return tuple(self._holders[name][1].get_slice(name).get_shape())

    def read(self, name: str, where: tuple[slice, ...] | None = None) -> torch.Tensor:
        """Only what is asked for is read from the disk."""
        file = self._holders[name][1]
        tensor: torch.Tensor = file.get_tensor(name) if where is None else file.get_slice(name)[where]
        return tensor

    def dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        """Numbers that are no floating point stay what they are."""
        if not stored.is_floating_point:
            return stored
        return torch.float32 if self._float32.intersection(name.split(".")) else self._dtype


class ModuleTensors:
    """Parameters and buffers of a module, as they are."""

    def __init__(self, module: nn.Module) -> None:
        self._name = type(module).__name__
        self._computed = dict(module.named_buffers()).keys() - module.state_dict().keys()
        self._tensors = {**dict(module.named_buffers()), **dict(module.named_parameters(remove_duplicate=False))}

    def __enter__(self) -> ModuleTensors:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is open."""

    def names(self) -> Iterable[str]:
        """All that there are."""
        return self._tensors.keys()

    def computed(self) -> Iterable[str]:
        """Return the names of buffers that the module keeps out of checkpoints."""
        return self._computed

    def origin(self, name: str) -> str:
        """The class of the module."""
        return f"the given {self._name}"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str, where: tuple[slice, ...] | None = None) -> torch.Tensor:
        """Return a tensor, or a view of it."""
        tensor = self._tensors[name].detach()
        return tensor if where is None else tensor[where]

    def dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        """Return the dtype that it has in the module."""
        return stored


def twin(module: nn.Module, of: Callable[[nn.Parameter], nn.Parameter]) -> nn.Module:
    """Copy the structure of a module. Buffers and other tensors are shared; ``of`` makes the parameters."""
    made: dict[int, Any] = {id(p): of(p) for p in module.parameters()}
    made |= {id(b): b.detach() for b in module.buffers()}
    for part in module.modules():
        made |= {id(x): x.detach() for x in vars(part).values() if isinstance(x, torch.Tensor)}
    return copy.deepcopy(module, made)


def hollow(parameter: nn.Parameter) -> nn.Parameter:
    """Make a parameter of the same shape without values."""
    return nn.Parameter(parameter.to("meta"), requires_grad=False)


def shared(parameter: nn.Parameter) -> nn.Parameter:
    """Make a parameter over the same memory that can move to another device by itself."""
    return nn.Parameter(parameter.detach(), requires_grad=False)
