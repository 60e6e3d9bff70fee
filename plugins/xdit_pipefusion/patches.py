"""The forward of PipeFusion: the patches of a step one after the other, each as soon as its rows are there.

Shapes: latents and prediction ``[B, C, h, w]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from xdit_core import AxisPlacement, ForwardCall, PatchTensor, RunForward
from xdit_pipefusion.stage import Stage


class PatchLoop:
    """Calls the denoiser once for each patch and returns a prediction whose patches are still on their way.

    The last stage sends each patch of the prediction to the first stage, whose scheduler waits for it only when it
    needs that patch.

    Args:
        warmup: synchronous steps at the start, in which the picture is one patch.
        stage: this rank's links to the other stages.
    """

    def __init__(self, warmup: int, stage: Stage) -> None:
        self.warmup, self.stage, self.placement = warmup, stage, AxisPlacement(stage.rank, "stages")
        self._blank: torch.Tensor | None = None

    def forget(self) -> None:
        """Free the buffer."""
        self._blank = None

    def __call__(self, inner: RunForward, call: ForwardCall) -> torch.Tensor:
        """One call of the denoiser by the pipeline.

        Args:
            call: its latents are plain or a patch tensor.

        Returns:
            A patch tensor of the prediction; in warm-up it has one patch.
        """
        context = call.context
        self.stage.begin_call()
        if context.branch.steps_done >= self.warmup and context.layout.patches > 1:
            return self.run(inner, call, range(context.layout.patches), context.cuts)
        height = call.latents.shape[context.row_dim]
        if self.stage.count == 1:
            return inner(call.but(latents=self.plain(call.latents, height)))
        return self.run(inner, call, [None], (0, height))

    def run(
        self, inner: RunForward, call: ForwardCall, patches: Sequence[int | None], bounds: Sequence[int]
    ) -> torch.Tensor:
        """Some patches through the blocks of this stage.

        Args:
            patches: their indices; None is the whole picture.
            bounds: rows of the latents at which they begin and end.
        """
        dim, values = call.context.row_dim, []
        for patch, top, bottom in zip(patches, bounds[:-1], bounds[1:], strict=True):
            if call.on_other_ranks:
                if self.stage.first and isinstance(call.latents, PatchTensor):
                    call.latents.rows(top, bottom)  # ranks that exchange these rows must reach them at the same time
                prediction = inner(call.of_patch(patch, call.latents))
                values.append(prediction.narrow(dim, top, bottom - top))
                continue
            prediction = inner(self.patch_call(call, patch, top, bottom))
            values.append(self.send_back(prediction, call, patch, top, bottom))
        return PatchTensor.make(
            values,
            shape=prediction.shape,
            dim=dim,
            bounds=bounds,
            dtype=prediction.dtype,
            device=prediction.device,
            placement=self.placement,
        )

    def plain(self, latents: torch.Tensor, height: int) -> torch.Tensor:
        """All rows, on a rank that has them."""
        return latents.rows(0, height) if isinstance(latents, PatchTensor) else latents

    def patch_call(self, call: ForwardCall, patch: int | None, top: int, bottom: int) -> ForwardCall:
        """The call for one patch: latents at full shape, of which at least the patch's rows are true on stage 0."""
        dim, latents = call.context.row_dim, call.latents
        height = latents.shape[dim]
        if self.stage.first and (bottom - top == height or not isinstance(latents, PatchTensor)):
            return call.of_patch(patch, self.plain(latents, height))
        if self._blank is None or (self._blank.shape, self._blank.dtype) != (latents.shape, latents.dtype):
            self._blank = torch.zeros(latents.shape, dtype=latents.dtype, device=latents.device)
        if not isinstance(latents, PatchTensor) or not self.stage.first:
            return call.of_patch(patch, self._blank, "none")
        self._blank.narrow(dim, top, bottom - top).copy_(latents.rows(top, bottom))
        return call.of_patch(patch, self._blank, "patch")

    def send_back(self, prediction: torch.Tensor, call: ForwardCall, patch: int | None, top: int, bottom: int) -> Any:
        """The value of one patch of the prediction, or on the first stage what waits for it."""
        stage, dim, rows = self.stage, call.context.row_dim, bottom - top
        if stage.count == 1:
            return prediction.narrow(dim, top, rows).contiguous()
        message = stage.message(call.context.but(patch=patch))
        if stage.last:
            stage.back.send(prediction.narrow(dim, top, rows), stage.ranks[0], message)
        return stage.back.receive(prediction, rows, dim, stage.ranks[-1], message).wait if stage.first else None
