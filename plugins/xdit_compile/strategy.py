"""Compiles the blocks or the whole denoiser with ``torch.compile``, and measures how long the compiler works.

The compiler works when a block first runs, not when it is loaded. So it is listened to around each job.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo
from torch._dynamo.callback import callback_handler
from torch.distributed.tensor import DTensor

from xdit_core import Absent, Rank, Status, UsageError, did_you_mean

if TYPE_CHECKING:
    from xdit_compile import Settings

# Blocks of a kind share their code, and a block meets a few kinds of input: with and without text, one size and any
# size. Where each size needs code of its own, there may be many.
VARIANTS, VARIANTS_BY_SIZE = 64, 1024


class Compile:
    """Compiles at load time; the work itself is done when a kind of block first runs.

    Raises:
        UsageError: torch has no such backend.
    """

    def __init__(self, settings: Settings, rank: Rank) -> None:
        self.settings, self.rank = settings, rank
        known = torch._dynamo.list_backends(exclude_tags=())
        if settings.backend not in known:
            raise UsageError(
                f"compile.backend={settings.backend} is unknown to torch; {did_you_mean(settings.backend, known)}"
            )
        self.dynamic = settings.dynamic
        self._began = 0.0

    def __call__(self, pipe: Any) -> None:
        """Replace the calls of the blocks, or of the whole denoiser, by compiled ones."""
        chosen, spec = self.settings, self.rank.spec
        denoisers = [part for name in spec.checkpoint.denoisers if (part := getattr(pipe, name, None)) is not None]
        # DTensor remembers how an operation divides by the sizes of its tensors, and cannot do so for unknown sizes
        if any(isinstance(p, DTensor) for denoiser in denoisers for p in denoiser.parameters()):
            self.dynamic = False
        options: dict[str, Any] = {"backend": chosen.backend, "fullgraph": chosen.fullgraph, "dynamic": self.dynamic}
        if chosen.mode is not None:
            options["mode"] = chosen.mode
        if chosen.scope == "transformer" or not spec.trunk.blocks:
            for denoiser in denoisers:
                denoiser.forward = torch.compile(denoiser.forward, **options)
            return
        lists = [name for part in spec.trunk.blocks for name in (part.attribute, *part.beside)]
        for block in (block for denoiser in denoisers for name in lists for block in getattr(denoiser, name)):
            if not isinstance(block, Absent):
                block.compile(**options)

    @contextmanager
    def job(self) -> Iterator[None]:
        """Surround a job: listen to the compiler, and let it make more variants than by default. Both act on the whole
        process."""
        with ExitStack() as stack:
            callback_handler.register_start_callback(self._start)
            stack.callback(callback_handler.remove_start_callback, self._start)
            callback_handler.register_end_callback(self._stop)
            stack.callback(callback_handler.remove_end_callback, self._stop)
            most = VARIANTS_BY_SIZE if self.dynamic is False else VARIANTS
            limits = {"recompile_limit": most, "accumulated_recompile_limit": 4 * most}
            stack.enter_context(torch._dynamo.config.patch(limits))  # type: ignore[no-untyped-call]
            yield

    def _start(self, _: Any) -> None:
        self._began = time.perf_counter()
        self.rank.observer.status(Status("compiling"))

    def _stop(self, _: Any) -> None:
        spent = time.perf_counter() - self._began
        self.rank.seconds["compile"] = self.rank.seconds.get("compile", 0.0) + spent
        self.rank.observer.status(Status("compiling", "is done"))
