"""Keys that the server makes for itself, each in a file that only its user can read."""

import os
import secrets
from pathlib import Path

KEY_BYTES = 32


def read_or_make_key(path: Path) -> bytes:
    """The key in a file, made at the first use. Raises `OSError`, and `ValueError` for a file that holds no key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        key = path.read_bytes()
        if len(key) != KEY_BYTES:
            raise ValueError(f"{path} does not hold a key of {KEY_BYTES} bytes") from None
        return key
    key = secrets.token_bytes(KEY_BYTES)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key)
    return key
