"""The program that reads PDFs: each becomes the text that is in it. Others wrote them, and the format is a language with loops."""

import io
import json
import logging

from pypdf import PdfReader
from pypdf.errors import FileNotDecryptedError

from mlx_manager.confined.child import Work, serve

MAX_PAGES = 500
MAX_CHARS = 4 << 20
_MEMORY_BYTES = 1 << 30


class _Unreadable(Exception):
    """Says why."""


def _prepared(_: bytes) -> Work:
    logging.disable()  # what it finds wrong with a file is nobody's
    return _read


def _read(data: bytes) -> bytes:
    """JSON: `text`, or the `error` why there is none."""
    try:
        answer = {"text": _text(data)}
    except _Unreadable as error:
        answer = {"error": str(error)}
    except FileNotDecryptedError:
        answer = {"error": "it needs a password"}
    except MemoryError:  # a limit, which its end tells of
        raise
    except Exception:  # noqa: BLE001 - of files that others wrote, in ways of their own
        answer = {"error": "it is damaged, or written in a way that cannot be read"}
    return json.dumps(answer).encode()


def _text(data: bytes) -> str:
    """Page by page, with an empty line between them."""
    document = PdfReader(io.BytesIO(data))
    num_pages = len(document.pages)
    if num_pages > MAX_PAGES:
        raise _Unreadable(f"it has {num_pages:,} pages, and {MAX_PAGES} at most are read")
    pages: list[str] = []
    num_chars = 0
    for page in document.pages:
        text = page.extract_text().replace("\0", "").strip()
        num_chars += len(text)
        if num_chars > MAX_CHARS:
            raise _Unreadable(f"it has more than {MAX_CHARS >> 20} million characters of text")
        if text:
            pages.append(text)
    if not pages:
        raise _Unreadable("it has no text: pages that are pictures cannot be read")
    return "\n\n".join(pages).encode(errors="ignore").decode()


if __name__ == "__main__":
    serve(_prepared, memory_bytes=_MEMORY_BYTES)
