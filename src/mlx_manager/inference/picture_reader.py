"""An encoded picture, or a video's → what a model is shown of it. On a worker's thread; knows nothing of MLX but that the processor may.

Whatever a client sent is looked at before it is decoded: a small file can hold a picture that takes gigabytes.
"""
# pyright: basic

import hashlib
import io
import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image as Pillow

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Image, Video
from mlx_manager.inference.picture import Frame, Picture
from mlx_manager.inference.video_reader import digest_of, frames_of

log = logging.getLogger(__name__)

MAX_PIXELS = 25_000_000
MAX_SIDE = 2048
# The first of them is shown.
MAX_FRAMES = 64
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_MAX_KEPT_BYTES = 128 << 20
_MAX_FRAME_BYTES = 64 << 20
# Decoding takes memory: no more than two pictures at a time, whoever asks.
_decoding = threading.Semaphore(2)


class PictureReader:
    """For one model. `placeholders` are texts that its template may write for a picture; `vocab_size` is where names begin."""

    def __init__(self, processor: Any, *, vocab_size: int) -> None:
        self._processor = processor
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, Picture] = OrderedDict()
        self._watched: OrderedDict[bytes, tuple[Frame, ...]] = OrderedDict()
        tokenizer = getattr(processor, "tokenizer", None)
        named = (getattr(owner, name, None) for owner in (processor, tokenizer) for name in ("boi_token", "image_token"))
        self.placeholders = tuple(dict.fromkeys(text for text in named if isinstance(text, str) and text))

    def watch(self, video: Video) -> tuple[Frame, ...]:
        """The frames that are shown of it, to be read like other pictures. Raises `InvalidField`, naming the field that it came in."""
        digest = digest_of(video)
        with self._lock:
            known = self._watched.get(digest)
        if known is not None:
            return tuple(replace(frame, where=video.where) for frame in known)
        with _decoding:
            frames = frames_of(video)
        with self._lock:
            self._watched[digest] = frames
            while sum(_frame_bytes(f) for f in self._watched.values()) > _MAX_FRAME_BYTES and len(self._watched) > 1:
                self._watched.popitem(last=False)
        return frames

    def read(self, image: Image | Frame, placeholder: str) -> Picture:
        """Raises `InvalidField`, naming the field that the picture came in."""
        digest = image.digest if isinstance(image, Frame) else hashlib.sha256(image.data).digest()
        with self._lock:
            known = self._kept.get(digest)
        if known is not None:
            return known
        with _decoding:
            pixels = image.pixels if isinstance(image, Frame) else decoded(image)
            try:
                picture = self._processed(digest, pixels, placeholder)
            except Exception as error:
                log.info("a picture of %d x %d pixels could not be made ready: %s", pixels.width, pixels.height, error)
                raise InvalidField(
                    f"Invalid '{image.where}': this model cannot be shown a picture of {pixels.width} x {pixels.height} pixels.",
                    param=image.where,
                ) from error
        with self._lock:
            self._kept[digest] = picture
            while sum(_num_bytes(p) for p in self._kept.values()) > _MAX_KEPT_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return picture

    def _processed(self, digest: bytes, image: Pillow.Image, placeholder: str) -> Picture:
        given = self._processor(text=[placeholder], images=[image], return_tensors="np")
        arrays = {name: np.asarray(value) for name, value in given.items() if name not in ("input_ids", "attention_mask")}
        tokens = tuple(int(t) for t in np.asarray(given["input_ids"])[0])
        bos = getattr(self._processor.tokenizer, "bos_token_id", None)
        tokens = tokens[1:] if bos is not None and tokens[:1] == (bos,) else tokens
        shape = hashlib.sha256(digest + b"".join(name.encode() + str(a.shape).encode() for name, a in sorted(arrays.items()))).digest()
        return Picture(shape, tokens, tuple(_names(shape, len(tokens), self._vocab_size)), arrays)


def decoded(image: Image) -> Pillow.Image:
    """In RGB and no larger than models look at. Raises `InvalidField`."""
    where = image.where
    try:
        with warnings.catch_warnings(), Pillow.open(io.BytesIO(image.data), formats=_FORMATS) as opened:
            warnings.simplefilter("ignore")  # Pillow has a limit of its own, which is ours below
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise InvalidField(
                    f"Invalid '{where}': a picture has {MAX_PIXELS // 1_000_000} million pixels at most, and this one {width * height:,}.",
                    param=where,
                )
            if (_gif_frames(image.data) if opened.format == "GIF" else getattr(opened, "n_frames", 1)) > MAX_FRAMES:
                raise InvalidField(f"Invalid '{where}': an animated picture has {MAX_FRAMES} frames at most.", param=where)
            opened.draft("RGB", (MAX_SIDE, MAX_SIDE))
            flat = opened.convert("RGBA") if "transparency" in opened.info or opened.mode in ("RGBA", "LA", "PA") else opened.convert("RGB")
    except InvalidField:
        raise
    except Exception as error:
        raise InvalidField(f"Invalid '{where}': the picture could not be read.", param=where) from error
    if flat.mode == "RGBA":
        white = Pillow.new("RGBA", flat.size, "white")
        flat = Pillow.alpha_composite(white, flat).convert("RGB")
    flat.thumbnail((MAX_SIDE, MAX_SIDE))
    return flat


def _gif_frames(data: bytes) -> int:
    """How many there are, as far as it matters: Pillow would go through all of them."""
    at = 13 + _table_bytes(data[10])
    num_frames = 0
    while num_frames <= MAX_FRAMES and at + 10 <= len(data):
        match data[at]:
            case 0x2C:  # a frame: where it goes, its colours, the size of its codes
                num_frames += 1
                at += 11 + _table_bytes(data[at + 9])
            case 0x21:  # an extension
                at += 2
            case _:
                break
        while at < len(data) and data[at]:  # its blocks, the last of them empty
            at += 1 + data[at]
        at += 1
    return num_frames


def _table_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _names(digest: bytes, count: int, vocab_size: int) -> Iterable[int]:
    """Tokens beyond the vocabulary, as 31-bit numbers, that follow from the picture alone."""
    room = 2**31 - 1 - vocab_size
    for i in range(count):
        drawn = int.from_bytes(hashlib.blake2b(digest + i.to_bytes(4, "little"), digest_size=8).digest(), "little")
        yield vocab_size + drawn % room


def _frame_bytes(frames: tuple[Frame, ...]) -> int:
    return sum(3 * frame.pixels.width * frame.pixels.height for frame in frames)


def _num_bytes(picture: Picture) -> int:
    return sum(array.nbytes for array in picture.arrays.values())
