import json
from pathlib import Path

import numpy as np
import pytest

from mlx_manager.bench.random_model import CONTEXT, SHAPES, Shape, write_model

SMALL = Shape(64, 2, 4, 2, 16, 96, "float32")


def numbers_of(file: Path) -> dict[str, tuple[str, np.ndarray]]:
    """The format as its specification says: a length, a JSON header, the bytes."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    types = {"F32": np.float32, "BF16": np.uint16}
    return {
        name: (one["dtype"], np.frombuffer(data[start:][slice(*one["data_offsets"])], types[one["dtype"]]).reshape(one["shape"]))
        for name, one in header.items()
        if name != "__metadata__"
    }


def test_a_model_of_the_shape_is_written_and_the_same_seed_writes_it_again(tmp_path: Path) -> None:
    num_parameters = write_model(SMALL, tmp_path / "one")
    write_model(SMALL, tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()
    weights = numbers_of(tmp_path / "one" / "model.safetensors")
    assert sum(array.size for _, array in weights.values()) == num_parameters
    assert weights["model.layers.1.self_attn.k_proj.weight"][1].shape == (32, 64)
    assert weights["model.layers.1.mlp.down_proj.weight"][1].std() == pytest.approx(1 / 96**0.5, rel=0.05)
    assert set(np.unique(weights["model.norm.weight"][1])) == {1.0}


def test_no_reply_can_end_by_itself_and_every_token_is_a_word(tmp_path: Path) -> None:
    write_model(SMALL, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    output = numbers_of(tmp_path / "model" / "model.safetensors")["lm_head.weight"][1]
    assert not output[config["eos_token_id"]].any()
    spoken = set(np.flatnonzero(output.any(axis=1)).tolist())
    tokenizer = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    assert len(spoken) > 100
    assert all(text.startswith("Ġ") for text, number in tokenizer["model"]["vocab"].items() if number in spoken)
    assert config["max_position_embeddings"] == CONTEXT


def test_shards_and_pieces_hold_the_same_model(tmp_path: Path) -> None:
    whole = Shape(64, 2, 4, 2, 16, 96, "bfloat16", vocab_size=4096)
    write_model(whole, tmp_path / "whole")
    write_model(whole, tmp_path / "parts", shard_bytes=300_000)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    parts = {name: array for file in set(index.values()) for name, array in numbers_of(tmp_path / "parts" / file).items()}
    for name, (dtype, array) in numbers_of(tmp_path / "whole" / "model.safetensors").items():
        assert dtype == "BF16"
        assert np.array_equal(array, parts[name][1])


def test_a_folder_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        write_model(SMALL, tmp_path)


def test_the_shapes_have_the_size_that_they_are_named_after() -> None:
    def num_parameters(shape: Shape, vocab_size: int) -> int:
        attention = 2 * shape.hidden_size * shape.head_dim * (shape.num_heads + shape.num_kv_heads)
        layer = attention + 3 * shape.hidden_size * shape.intermediate_size + 2 * shape.hidden_size
        return shape.num_layers * layer + shape.hidden_size * (2 * vocab_size + 1)

    assert num_parameters(SHAPES["llama-15m"], 1728) / 1e6 == pytest.approx(15, abs=0.1)
    assert num_parameters(SHAPES["llama-8b"], 128_256) == 8_030_261_248
