"""Pictures, videos and files as clients send them → what was in them. Nothing is decoded here, nor fetched."""

import base64
import binascii
import re
from collections.abc import Iterable
from typing import Any

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Document, Image, Message, RemoteImage, Video

MAX_IMAGE_BYTES = 20 << 20
# Of a request, with its whole history.
MAX_PICTURES = 32
IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif")
VIDEO_TYPES = ("video/mp4", "video/quicktime", "video/webm")
# What is looked at of a video unless the client says how much.
NUM_FRAMES = 8
# Browsers name the codecs of what they record in its address, with commas that do not belong there.
_MAX_VIDEO_HEAD = 256
# As its bytes begin, whatever a client calls it; some programs put white space before.
_PDF = re.compile(rb"\s{0,64}%PDF-\d")
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w=.+-]+)*?(;base64)?,(.*)", re.DOTALL | re.IGNORECASE)


def check_pictures(messages: Iterable[Message]) -> None:
    """Raises `InvalidField`, naming the first that is one too many. A video counts as its frames."""
    num_pictures = 0
    for part in (part for message in messages for part in message.media):
        num_pictures += part.num_frames if isinstance(part, Video) else 1
        if num_pictures > MAX_PICTURES:
            text = f"a request has {MAX_PICTURES} pictures at most, each frame that is shown of a video among them"
            raise InvalidField(f"Invalid '{part.where}': {text}.", param=part.where)


def image_from_url(url: str, where: str) -> Image | RemoteImage:
    """Raises `InvalidField`, naming `where`, for a `data:` URL that holds no picture in base64, and for all that is no URL of the web.
    Whether those are fetched is for others to say."""
    if url[:8].lower().startswith(("http://", "https://")):
        return RemoteImage(url, where)
    match = _DATA_URL.fullmatch(url)
    if match is None:
        raise InvalidField(f"Invalid '{where}': expected a picture as a 'data:' URL.", param=where)
    media_type, is_base64, data = match.groups()
    if not is_base64:
        raise InvalidField(f"Invalid '{where}': the picture must be in base64.", param=where)
    return image_from_base64(data, media_type or "", where)


def image_from_base64(data: str, media_type: str, where: str) -> Image:
    """Raises `InvalidField`, naming `where`, for another type of picture, too many bytes, or no base64."""
    if media_type.lower() not in IMAGE_TYPES:
        raise InvalidField(f"Invalid '{where}': a picture is one of {', '.join(IMAGE_TYPES)}.", param=where)
    if len(data) * 3 // 4 > MAX_IMAGE_BYTES:
        raise InvalidField(f"Invalid '{where}': a picture has {MAX_IMAGE_BYTES >> 20} MB at most.", param=where)
    return Image(_from_base64(data, where), where)


def _from_base64(data: str, where: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"\s", "", data), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidField(f"Invalid '{where}': it is not base64.", param=where) from None


def video_from_url(url: str, num_frames: int | None, where: str) -> Video:
    """Raises `InvalidField`, naming `where`, for anything but a `data:` URL that holds a video in base64."""
    head, mark, _ = url[:_MAX_VIDEO_HEAD].lower().partition(";base64,")
    scheme, _, media_type = head.partition(";")[0].partition(":")
    if scheme != "data" or not mark:
        raise InvalidField(f"Invalid '{where}': videos are taken from 'data:' URLs in base64 only; this server fetches none.", param=where)
    if media_type not in VIDEO_TYPES:
        raise InvalidField(f"Invalid '{where}': a video is one of {', '.join(VIDEO_TYPES)}.", param=where)
    return Video(_from_base64(url[len(head) + len(mark) :], where), NUM_FRAMES if num_frames is None else num_frames, where)


def file_parts(file: dict[str, Any], where: str) -> list[str | Document]:
    """What an attached file says. Raises `InvalidField` for one that is only named, or that holds neither text nor a PDF."""
    if file.get("file_data") is None:
        raise InvalidField(f"Invalid '{where}': files are taken by 'file_data' only; nothing is stored here.", param=f"{where}.file_data")
    data = file["file_data"]
    if not isinstance(data, str):
        raise InvalidField(f"Invalid type for '{where}.file_data': expected a string.", param=f"{where}.file_data", code="invalid_type")
    match = _DATA_URL.fullmatch(data)
    media_type, is_base64, content = match.groups() if match else ("", ";base64", data)
    try:
        decoded = base64.b64decode(content, validate=True) if is_base64 else content.encode()
        said = written(decoded, f"{where}.file_data")
    except (binascii.Error, ValueError):
        kind = f" of type {media_type}" if media_type else ""
        raise InvalidField(
            f"Invalid '{where}.file_data': only text and PDFs can be read, and this file{kind} is neither.",
            param=f"{where}.file_data",
            code="unsupported_value",
        ) from None
    name = file.get("filename")
    return [f"{name}:\n", said] if isinstance(name, str) and name else [said]


def written(data: bytes, where: str) -> str | Document:
    """A file that is text, or a PDF to be read later. Raises `ValueError` for another."""
    return Document(data, where) if _PDF.match(data) else data.decode("utf-8")


def data_url(image: Image) -> str:
    """A picture as clients send one; its type is that of its bytes."""
    return f"data:{image_type(image)};base64,{base64.b64encode(image.data).decode()}"


def pdf_file(document: Document) -> dict[str, str]:
    """A PDF as OpenAI's APIs take it; they want a name, which is not kept here apart from the text before it."""
    return {"filename": "document.pdf", "file_data": f"data:application/pdf;base64,{base64.b64encode(document.data).decode()}"}


def image_type(image: Image) -> str:
    return next((kind for beginning, kind in _BEGINNINGS if image.data.startswith(beginning)), "image/webp")


_BEGINNINGS = ((b"\x89PNG", "image/png"), (b"\xff\xd8", "image/jpeg"), (b"GIF8", "image/gif"))
