"""Between files and ComfyUI's tensors: IMAGE is ``[n, h, w, 3]`` and MASK ``[n, h, w]``, both from 0 to 1."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch


def opened(data: bytes) -> Any:
    """A PIL picture in RGB.

    Args:
        data: PNG, JPEG or WebP.
    """
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def image_of(files: Iterable[bytes]) -> torch.Tensor:
    """Pictures of one size as IMAGE.

    Args:
        files: PNG, JPEG or WebP of each.
    """
    return stacked(np.asarray(opened(data)) for data in files)


def frames_of(data: bytes) -> tuple[torch.Tensor, float]:
    """The frames of a video as IMAGE, and frames per second.

    Args:
        data: MP4.
    """
    import av

    with av.open(io.BytesIO(data), "r") as video:
        frames = stacked(frame.to_ndarray(format="rgb24") for frame in video.decode(video=0))
        return frames, float(video.streams.video[0].average_rate or 0)


def stacked(arrays: Iterable[np.ndarray[Any, Any]]) -> torch.Tensor:
    """Pictures ``[h, w, 3]`` from 0 to 255 as IMAGE."""
    return torch.from_numpy(np.stack(list(arrays)).astype(np.float32) / 255.0)


def png_of(picture: torch.Tensor) -> bytes:
    """One picture of IMAGE, ``[h, w, 3]``, as PNG."""
    return _saved((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())


def png_of_mask(mask: torch.Tensor) -> bytes:
    """A MASK as the PNG of OpenAI's API, which is transparent where the picture is to be changed.

    Args:
        mask: ``[1, h, w]`` or ``[h, w]``, 1 where the picture is to be changed.
    """
    mask = mask.reshape(mask.shape[-2:])
    picture = np.zeros((*mask.shape, 4), np.uint8)
    picture[..., 3] = ((1 - mask.clamp(0, 1)) * 255).round().byte().cpu().numpy()
    return _saved(picture)


def _saved(array: np.ndarray[Any, Any]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
