"""Which weights a folder holds, without reading all of them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from mlx_manager.hub.adapters import CONFIG
from mlx_manager.hub.checkpoint import Adapter

_SAMPLE_BYTES = 65_536
_NUM_SAMPLES = 16


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
