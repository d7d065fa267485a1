"""The header of a safetensors file: 8 bytes of length (little-endian), then JSON. Read by us before anything that maps the file
trusts its offsets."""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


class BadHeader(ValueError):
    """The file is not what its header says. Its text goes after the file's name."""


@dataclass(frozen=True, slots=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises BadHeader unless every one lies inside the file and none overlaps another."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = header_length(file.read(8), file_bytes)
        return parse_header(file.read(header_bytes), file_bytes)


def header_length(beginning: bytes, file_bytes: int) -> int:
    """Of the JSON that follows the first 8 bytes. Raises BadHeader."""
    header_bytes = int.from_bytes(beginning[:8], "little")
    if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
        raise BadHeader("its header has an impossible length")
    return header_bytes


def parse_header(text: bytes, file_bytes: int) -> dict[str, Tensor]:
    """The same of the JSON itself. Raises BadHeader."""
    try:
        header: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadHeader("its header is not JSON") from error
    if not isinstance(header, dict):
        raise BadHeader("its header is not an object")
    entries = {name: entry for name, entry in cast(dict[str, Any], header).items() if name != "__metadata__"}
    return _check(entries, data_bytes=file_bytes - 8 - len(text))


def _check(entries: dict[str, Any], data_bytes: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in entries.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
                pass
            case _:
                raise BadHeader(f"{name[:100]!r} is not described by a type, a shape and two offsets")
        if dtype not in BITS:
            raise BadHeader(f"{name[:100]!r} has the unknown type {dtype[:20]!r}")
        if not 0 <= begin <= end <= data_bytes:
            raise BadHeader(f"{name[:100]!r} lies outside the file")
        num_elements = _num_elements(shape, limit=data_bytes)
        if num_elements is None or num_elements * BITS[dtype] != (end - begin) * 8:
            raise BadHeader(f"{name[:100]!r} has a shape that its bytes do not fill")
        tensors[name] = Tensor(dtype, tuple(shape))
        spans.append((begin, end))
    spans.sort()
    if any(end > begin for (_, end), (begin, _) in itertools.pairwise(spans)):
        raise BadHeader("tensors overlap")
    return tensors


def _num_elements(shape: list[Any], limit: int) -> int | None:
    """The product; None once it passes the limit, so that no shape costs more than its own length."""
    product = 1
    for size in shape:
        if not isinstance(size, int) or size < 0:
            return None
        product *= size
        if product > limit:
            return None
    return product
