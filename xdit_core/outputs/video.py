"""Videos as MP4, through PyAV.

PyAV rather than imageio-ffmpeg: both have wheels for Linux, macOS and Windows and a BSD licence, and both bring FFmpeg
with x264 (GPL, which is used here and not passed on); but PyAV needs no second process, which gloo and NCCL ranks had
better not fork, its errors are exceptions and not text on a pipe, and it reads back what it wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BT709 = 1  # matrix, primaries and transfer in the numbers of H.273; a browser takes 720 and more untagged rows for it
NARROW = 1  # luma from 16 to 235
THREADS = 4  # their number is in the bytes of the file, so that it must not follow from the machine


def write_video(frames: Sequence[Any], path: Path, fps: int, about: str) -> None:
    """Write frames as H.264 that browsers play.

    Args:
        frames: PIL pictures of one size. The last row or column is repeated where a side is odd, since colours are
            halved.
        path: of any suffix.
        fps: frames a second.
        about: goes into the file as its comment.

    Raises:
        OSError: the disk is full or the folder has gone.
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
    """The picture in the middle of a video that ``write_video`` wrote, without holding the others.

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
    """The comment in a video, "" if it has none.

    Raises:
        ValueError: it is no video.
    """
    import av

    try:
        with av.open(str(path.absolute())) as container:
            return str(container.metadata.get("comment", ""))
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} is no video: {error}") from error
