"""Models of a given shape with random weights, for measuring how fast a server is. What they say means nothing.

Their replies have the length that was asked for: only tokens that are a whole word have a row in the output matrix, all others
have zeros there, the ends of a reply among them, so that a greedy reply is visible token by token and never ends by itself. Needs
no MLX: the files are written a piece of a matrix at a time, so a model may be larger than the memory.
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from mlx_manager.config import BUNDLED_MODELS

STARTER = BUNDLED_MODELS / "starter"
PIECE_BYTES = 2**26
SHARD_BYTES = 4 * 2**30
CONTEXT = 16_384
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a llama. `vocab_size` None is that of the tokenizer; more than it has are tokens that nobody writes."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    dtype: Literal["float32", "bfloat16"]
    rope_theta: float = 10_000.0
    vocab_size: int | None = None


SHAPES = {
    "llama-15m": Shape(256, 8, 8, 4, 64, 1792, "float32"),
    "llama-8b": Shape(4096, 32, 32, 8, 128, 14_336, "bfloat16", 500_000.0, 128_256),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    is_norm: bool = False
    is_output: bool = False

    def num_bytes(self, item_bytes: int) -> int:
        return math.prod(self.shape) * item_bytes


@dataclass(frozen=True, slots=True)
class Vocabulary:
    size: int
    ends: tuple[int, ...]
    words: tuple[int, ...]
    """Tokens that are a space and a word: each is seen at once, whatever comes after it."""


def write_model(shape: Shape, folder: Path, *, shard_bytes: int = SHARD_BYTES, seed: int = 0) -> int:
    """Makes the folder and writes the model into it, with the starter's tokenizer and chat template; the number of parameters.
    The same seed writes the same model. Raises FileExistsError for a folder that is there already."""
    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(STARTER / name, folder / name)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    _write_json(folder / "tokenizer_config.json", {**settings, "model_max_length": CONTEXT})
    vocabulary = _vocabulary(shape)
    _write_json(folder / "config.json", _config(shape, vocabulary))
    tensors = _tensors(shape, vocabulary)
    item_bytes = 4 if shape.dtype == "float32" else 2
    shards = _shards(tensors, item_bytes, shard_bytes)
    names = (
        [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)] if len(shards) > 1 else ["model.safetensors"]
    )
    lot = np.random.default_rng(seed)
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, shape, vocabulary, lot)
    if len(shards) > 1:
        index = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.num_bytes(item_bytes) for tensor in tensors)
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _vocabulary(shape: Shape) -> Vocabulary:
    tokenizer: dict[str, Any] = json.loads((STARTER / "tokenizer.json").read_text(encoding="utf-8"))
    ids: dict[str, int] = tokenizer["model"]["vocab"]
    known = max([*ids.values(), *(int(token["id"]) for token in tokenizer["added_tokens"])]) + 1
    size = math.ceil(known / 64) * 64 if shape.vocab_size is None else shape.vocab_size
    ends: list[int] = json.loads((STARTER / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    words = (number for text, number in ids.items() if text[:1] == "Ġ" and text[1:].isascii() and text[1:].isalpha())
    return Vocabulary(size, tuple(ends), tuple(sorted(words)))


def _config(shape: Shape, vocabulary: Vocabulary) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary.size,
        "bos_token_id": None,
        "eos_token_id": list(vocabulary.ends),
        "torch_dtype": shape.dtype,
    }


def _tensors(shape: Shape, vocabulary: Vocabulary) -> list[Tensor]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    tensors = [Tensor("model.embed_tokens.weight", (vocabulary.size, hidden))]
    for layer in range(shape.num_layers):
        at = f"model.layers.{layer}"
        tensors += [
            Tensor(f"{at}.input_layernorm.weight", (hidden,), is_norm=True),
            Tensor(f"{at}.self_attn.q_proj.weight", (queries, hidden)),
            Tensor(f"{at}.self_attn.k_proj.weight", (keys, hidden)),
            Tensor(f"{at}.self_attn.v_proj.weight", (keys, hidden)),
            Tensor(f"{at}.self_attn.o_proj.weight", (hidden, queries)),
            Tensor(f"{at}.post_attention_layernorm.weight", (hidden,), is_norm=True),
            Tensor(f"{at}.mlp.gate_proj.weight", (inner, hidden)),
            Tensor(f"{at}.mlp.up_proj.weight", (inner, hidden)),
            Tensor(f"{at}.mlp.down_proj.weight", (hidden, inner)),
        ]
    return [
        *tensors,
        Tensor("model.norm.weight", (hidden,), is_norm=True),
        Tensor("lm_head.weight", (vocabulary.size, hidden), is_output=True),
    ]


def _shards(tensors: list[Tensor], item_bytes: int, shard_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        size = tensor.num_bytes(item_bytes)
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= size
    return shards


def _write_shard(file: Path, tensors: list[Tensor], shape: Shape, vocabulary: Vocabulary, lot: np.random.Generator) -> None:
    """The safetensors format: the length of a JSON header in 8 bytes, the header, then the numbers."""
    item_bytes, dtype = (4, "F32") if shape.dtype == "float32" else (2, "BF16")
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    at = 0
    for tensor in tensors:
        end = at + tensor.num_bytes(item_bytes)
        header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": (at, end)}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            _write_numbers(out, tensor, shape, vocabulary, lot)


def _write_numbers(out: BinaryIO, tensor: Tensor, shape: Shape, vocabulary: Vocabulary, lot: np.random.Generator) -> None:
    for first, count in _pieces(tensor):
        if tensor.is_norm:
            numbers = np.ones(count, np.float32)
        else:  # of variance 1 / inputs: what goes in comes out as large, however many layers there are
            numbers = lot.random((count, tensor.shape[1]), np.float32)
            numbers -= 0.5
            numbers *= math.sqrt(12 / tensor.shape[1])
        if tensor.is_output:
            silent = np.ones(count, bool)
            silent[[word - first for word in vocabulary.words if first <= word < first + count]] = False
            numbers[silent] = 0
        out.write((numbers if shape.dtype == "float32" else (numbers.view(np.uint32) >> 16).astype(np.uint16)).tobytes())


def _pieces(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(first row, number of rows)."""
    num_rows = tensor.shape[0]
    step = max(1, PIECE_BYTES * num_rows // tensor.num_bytes(4))
    return ((first, min(step, num_rows - first)) for first in range(0, num_rows, step))


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
