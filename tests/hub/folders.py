"""Model folders with real files and no meaning in their weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}
BERT: dict[str, Any] = {"model_type": "bert", "architectures": ["BertModel"], "max_position_embeddings": 512}
WEIGHTS: dict[str, Any] = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}}


def write_safetensors(path: Path, header: object = WEIGHTS, data: bytes = bytes(32), header_bytes: int | None = None) -> None:
    """`header_bytes` is the length that the file claims for its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if header_bytes is None else header_bytes).to_bytes(8, "little") + text + data)


def write_model(path: Path, config: Mapping[str, Any] = LLAMA, **files: object) -> Path:
    """A folder with a config.json and one weight file; more JSON files by their stems."""
    path.mkdir(parents=True)
    for stem, content in {"config": config, **files}.items():
        (path / f"{stem}.json").write_text(json.dumps(content))
    write_safetensors(path / "model.safetensors")
    return path


def write_base(path: Path, layers: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] = LLAMA, **tensors: np.ndarray) -> Path:
    """A model whose layers have weights of these shapes; more tensors by their names."""
    write_model(path, config)
    save_file({f"{layer}.weight": np.zeros(shape, np.float32) for layer, shape in layers.items()} | tensors, path / "model.safetensors")
    return path


def write_adapter(
    path: Path, config: object, tensors: Mapping[str, tuple[int, ...]], *, peft: bool = False, dtype: Any = np.float32
) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    arrays = {name: np.zeros(shape, dtype) for name, shape in tensors.items()}
    save_file(arrays, path / ("adapter_model.safetensors" if peft else "adapters.safetensors"))
    return path
