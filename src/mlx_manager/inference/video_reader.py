"""An encoded clip → a few of its frames, spread evenly over it. On a worker's thread.

FFmpeg, inside OpenCV, finds out by itself what a file is, and some formats name other files and addresses to read. So what a client
sent is known by its first bytes before FFmpeg sees it, and FFmpeg is told to open no other format and nothing but files.
"""
# pyright: basic

import hashlib
import os
import tempfile
import time
from functools import cache
from typing import Any, NoReturn

from PIL import Image as Pillow

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Video
from mlx_manager.inference.picture import Frame

MAX_SECONDS = 120.0
MAX_PIXELS = 25_000_000
# Of a frame. There are several, and each takes as many tokens as a picture of its size.
MAX_SIDE = 768
MAX_DECODE_S = 30.0
_FFMPEG_OPTIONS = "format_whitelist;mov,mp4,m4a,3gp,3g2,mj2,matroska,webm|protocol_whitelist;file"


def digest_of(video: Video) -> bytes:
    """The same for the same frames of the same clip."""
    return hashlib.sha256(video.num_frames.to_bytes(4, "little") + video.data).digest()


def frames_of(video: Video, *, max_decode_s: float = MAX_DECODE_S) -> tuple[Frame, ...]:
    """At least one. Raises `InvalidField`, naming the field that the clip came in."""
    if not _is_clip(video.data):
        _unreadable(video)
    digest = digest_of(video)
    with tempfile.NamedTemporaryFile(prefix="mlx-manager-", suffix=".video") as file:  # only its owner may read it
        file.write(video.data)
        file.flush()
        pixels = _Clip(video, file.name, max_decode_s).frames()
    total = len(pixels).to_bytes(4, "little")
    return tuple(
        Frame(hashlib.sha256(digest + i.to_bytes(4, "little") + total).digest(), image, video.where) for i, image in enumerate(pixels)
    )


def _is_clip(data: bytes) -> bool:
    """MP4 and QuickTime, or Matroska and its part WebM."""
    return (data[:1] == b"\0" and data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")) or data[:4] == b"\x1aE\xdf\xa3"


class _Clip:
    """What is said of its length may be missing or wrong: it is believed as long as there are frames."""

    def __init__(self, video: Video, path: str, max_decode_s: float) -> None:
        self._video = video
        self._path = path
        self._deadline = time.monotonic() + max_decode_s
        self._max_decode_s = max_decode_s

    def frames(self) -> list[Pillow.Image]:
        said = self._said_length()
        found, length = self._read(spread(self._video.num_frames, said))
        if length is not None and length < said:  # it ended early
            found, _ = self._read(spread(self._video.num_frames, length))
        if not found:
            _unreadable(self._video)
        return found

    def _said_length(self) -> int:
        """In frames."""
        cv2, capture = opencv(), self._opened()
        try:
            width, height = capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
            num_frames, rate = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
        finally:
            capture.release()
        self._check_size(width, height)
        if not (num_frames >= 1 and rate > 0):
            return _UNKNOWN
        self._check_seconds(num_frames / rate)
        return int(num_frames)

    def _read(self, wanted: list[int]) -> tuple[list[Pillow.Image], int | None]:
        """The frames of these numbers, as far as there are so many, and how many there are if it ended before the last of them."""
        cv2, capture = opencv(), self._opened()
        found: list[Pillow.Image] = []
        try:
            for number in range(wanted[-1] + 1):
                if not capture.grab():
                    return found, number
                if time.monotonic() > self._deadline:
                    where = self._video.where
                    raise InvalidField(f"Invalid '{where}': decoding it takes more than {self._max_decode_s:g} seconds.", param=where)
                self._check_seconds(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
                if number in wanted:
                    found.append(self._retrieved(capture))
        finally:
            capture.release()
        return found, None

    def _retrieved(self, capture: Any) -> Pillow.Image:
        is_there, pixels = capture.retrieve()
        if not is_there or pixels is None or pixels.ndim != 3:
            _unreadable(self._video)
        self._check_size(pixels.shape[1], pixels.shape[0])
        image = Pillow.fromarray(pixels[:, :, ::-1])  # OpenCV has blue first
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        return image

    def _opened(self) -> Any:
        cv2 = opencv()
        try:
            capture = cv2.VideoCapture(self._path, cv2.CAP_FFMPEG)
        except cv2.error:
            _unreadable(self._video)
        if not capture.isOpened():
            _unreadable(self._video)
        return capture

    def _check_size(self, width: float, height: float) -> None:
        if width * height > MAX_PIXELS:
            where = self._video.where
            message = f"a frame has {MAX_PIXELS // 1_000_000} million pixels at most, and here it has {int(width * height):,}"
            raise InvalidField(f"Invalid '{where}': {message}.", param=where)

    def _check_seconds(self, seconds: float) -> None:
        if seconds > MAX_SECONDS:
            where = self._video.where
            raise InvalidField(f"Invalid '{where}': a video is {MAX_SECONDS:g} seconds long at most.", param=where)


# More frames than any clip of the length that is taken.
_UNKNOWN = 1 << 20


def spread(num_wanted: int, length: int) -> list[int]:
    """So many numbers of frames, or all there are: the middles of equal parts."""
    num = min(num_wanted, length)
    return [(2 * i + 1) * length // (2 * num) for i in range(num)]


def _unreadable(video: Video) -> NoReturn:
    raise InvalidField(f"Invalid '{video.where}': the video could not be read.", param=video.where)


@cache
def opencv() -> Any:
    """The library, told what it may open and that it is to be silent."""
    os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", _FFMPEG_OPTIONS)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # nothing: what a client sent is told to that client
    import cv2  # noqa: PLC0415 - takes a while, and reads these variables

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2
