import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_manager.hub.safetensors import BadHeader, Tensor, read_header
from tests.hub.folders import write_safetensors


def entry(begin: int, end: int, shape: list[Any], dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_of_the_reference_writer_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    arrays = {"a": np.zeros((3, 5), np.float32), "b": np.zeros((), np.int8), "c": np.zeros((0, 4), np.float16)}
    save_file(arrays, path, metadata={"format": "mlx"})
    assert read_header(path) == {"a": Tensor("F32", (3, 5)), "b": Tensor("I8", ()), "c": Tensor("F16", (0, 4))}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": entry(0, 64, [64])}, "outside the file"),
        ({"a": entry(-8, 8, [16])}, "outside the file"),
        ({"a": entry(8, 0, [8])}, "outside the file"),
        ({"a": entry(0, 8, [8]), "b": entry(4, 12, [8])}, "overlap"),
        ({"a": entry(0, 8, [10**9, 10**9])}, "shape"),
        ({"a": entry(0, 8, [2] * 1_000_000)}, "shape"),
        ({"a": entry(0, 8, [-8])}, "shape"),
        ({"a": entry(0, 8, [8.0])}, "shape"),
        ({"a": entry(0, 8, [4], "F32")}, "shape"),
        ({"a": entry(0, 8, [8], "EVIL")}, "unknown type"),
        ({"a": {"dtype": "U8", "shape": [8]}}, "not described"),
        ({"a": entry(0, 8, [8]) | {"data_offsets": [0, 8, 9]}}, "not described"),
        ({"a": 3}, "not described"),
        ([], "not an object"),
        (b"{ ", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path: Path, header: object, reason: str) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, header)
    with pytest.raises(BadHeader, match=reason):
        read_header(path)


@pytest.mark.parametrize("header_bytes", [0, 1, 10_000, 100_000_001, 2**63])
def test_a_header_of_impossible_length_is_not_read(tmp_path: Path, header_bytes: int) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, header_bytes=header_bytes)
    if header_bytes > 100_000_000:
        os.truncate(path, 200_000_000)  # sparse: long enough, were there no limit
    with pytest.raises(BadHeader, match="impossible length"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\x02", bytes(8)])
def test_a_stub_of_a_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadHeader):
        read_header(path)


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(BadHeader):
            read_header(path)
