"""Videos as MP4, through PyAV: wheels with FFmpeg inside for Linux, macOS and Windows, and no second process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_video(frames: Sequence[Any], path: Path, fps: int, about: str) -> None:
    """Write frames as H.264 that browsers play.

    Args:
        frames: PIL pictures of one size. The last row or column is repeated where a side is odd, since colours are halved.
        path: of any suffix.
        fps: frames a second.
        about: goes into the file as its comment.
    """
    import av
    import numpy as np

    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        container.metadata["comment"] = about
        stream: Any = None
        for frame in frames:
            pixels = np.asarray(frame.convert("RGB"))
            height, width = pixels.shape[:2]
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if stream is None:
                stream = container.add_stream("libx264", rate=fps, options={"crf": "17"})
                stream.width, stream.height, stream.pix_fmt = pixels.shape[1], pixels.shape[0], "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())


def middle_frame(path: Path) -> Any:
    """The picture in the middle of a video."""
    import av

    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    middle: Any = frames[len(frames) // 2]
    return middle.to_image()
