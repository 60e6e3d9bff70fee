"""Write and read videos as MP4, with PyAV.

PyAV and imageio-ffmpeg both have wheels for Linux, macOS and Windows and a BSD licence, and both bring FFmpeg with x264
(GPL, which is used here and not distributed). PyAV is used because it needs no second process, which ranks with gloo or
NCCL should not fork, because its errors are exceptions, and because it can read videos too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BT709 = 1  # as matrix, primaries and transfer in H.273; browsers assume it for untagged videos of 720 rows and more
NARROW = 1  # luma from 16 to 235
THREADS = 4  # encoder threads; the number changes the bytes of the file, so it must not depend on the machine


def write_video(frames: Sequence[Any], path: Path, fps: int, about: str) -> None:
    """Write frames as H.264 that browsers play.

    Args:
        frames: PIL pictures of one size. If a side is odd, its last row or column is repeated, since H.264 stores
            colours at half the size.
        path: the file, with any suffix.
        fps: frames per second.
        about: the comment of the file.

    Raises:
        OSError: the disk is full or the folder does not exist any more.
        ValueError: there is no frame.
    """
    import av
    import numpy as np

    if not frames:
        raise ValueError("a video without frames cannot be written")
    # absolute: FFmpeg would read "night:1.mp4" as a protocol
    with av.open(str(path.absolute()), "w", format="mp4", options={"movflags": "faststart"}) as container:
        container.metadata["comment"] = about
        stream: Any = container.add_stream("libx264", rate=fps, options={"crf": "17", "threads": str(THREADS)})
        width, height = frames[0].size
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        code = stream.codec_context
        code.colorspace = code.color_primaries = code.color_trc = BT709
        code.color_range = NARROW
        for frame in frames:
            pixels = np.pad(np.asarray(frame.convert("RGB")), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def middle_frame(path: Path) -> Any:
    """Read the middle frame of a video that ``write_video`` wrote; only one frame is in memory at a time.

    Raises:
        OSError, ValueError: the file cannot be read.
    """
    import av

    with av.open(str(path.absolute())) as container:
        last = container.streams.video[0].frames // 2
        for i, frame in enumerate(container.decode(video=0)):
            if i == last:
                # older PyAV (14 to 16) passes the matrix on only where the two differ; for RGB the second means nothing
                middle: Any = frame.reformat(format="rgb24", src_colorspace="ITU709", dst_colorspace="ITU601")
                return middle.to_image()
    raise ValueError(f"{path} ends before its middle")


def comment_of(path: Path) -> str:
    """Read the comment of a video, "" if it has none.

    Raises:
        ValueError: the file is not a video.
    """
    import av

    try:
        with av.open(str(path.absolute())) as container:
            return str(container.metadata.get("comment", ""))
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} is no video: {error}") from error
