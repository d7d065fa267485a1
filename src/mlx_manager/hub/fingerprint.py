"""Which weights a folder holds, without reading all of them."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from mlx_manager.hub.adapters import CONFIG
from mlx_manager.hub.checkpoint import Adapter, Checkpoint

_SAMPLE_BYTES = 65_536
_NUM_SAMPLES = 16
_PARTS = ("*.safetensors", "*.json", "*.jinja")


def fingerprint(folder: Path) -> str:
    """Hexadecimal; the same only for the same configuration and, as far as samples spread over each file tell, the same weights.
    Raises `OSError`."""
    return _digest(sorted([folder / "config.json", *folder.glob("*.safetensors")]))


def adapter_fingerprint(adapter: Adapter) -> str:
    """The same of an adapter."""
    return _digest([adapter.path / CONFIG, adapter.file])


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for i in range(_NUM_SAMPLES):
                file.seek(size * i // _NUM_SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def files_fingerprint(checkpoint: Checkpoint) -> str:
    """Of all that a model is made of: weights and configuration, tokenizer and template, and its adapter. Files that have neither another
    size nor another time are not read again. Raises `OSError`."""
    files = sorted(path for pattern in _PARTS for path in checkpoint.path.glob(pattern))
    if checkpoint.adapter is not None:
        files += [checkpoint.adapter.path / CONFIG, checkpoint.adapter.file]
    return _remembered(tuple((path, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files))


@lru_cache(maxsize=256)
def _remembered(files: tuple[tuple[Path, int, int], ...]) -> str:
    return _digest([path for path, _, _ in files])
