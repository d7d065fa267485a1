import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.utils import MODEL_REMAPPING

from mlx_manager.hub.checkpoint import (
    EMBEDDING_MODULES,
    SAME_ARCHITECTURE,
    Checkpoint,
    Unusable,
    kv_bytes_per_token,
    pass_bytes_per_token,
    read,
)
from tests.hub.folders import BERT, LLAMA, WEIGHTS, write_model, write_safetensors

VISION_WEIGHTS: dict[str, Any] = {"vision_tower.proj.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}}


def reason(path: Path) -> str:
    with pytest.raises(Unusable) as refusal:
        read(path, "model")
    return refusal.value.reason


def test_a_text_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "llama")
    os.utime(path / "config.json", (0, 1_700_000_000.5))
    assert read(path, "org/llama") == Checkpoint(
        id="org/llama",
        path=path,
        kind="text",
        architecture="llama",
        context_length=2048,
        size_bytes=(path / "model.safetensors").stat().st_size,
        quantization_bits=None,
        num_parameters=8,
        created=1_700_000_000,
    )


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LLAMA, "text"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "text"),
        ({"model_type": "gemma3", "text_config": {}, "vision_config": {}, "architectures": ["Gemma3ForConditionalGeneration"]}, "vision"),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}, "vision_config": {}}, "vision"),
        ({"model_type": "gemma3", "text_config": {}, "image_token_index": 5}, "text"),
        (BERT, "embedding"),
        ({"model_type": "xlm-roberta", "architectures": ["XLMRobertaForMaskedLM"]}, "embedding"),
        ({"model_type": "roberta", "architectures": ["RobertaModel"]}, "unsupported"),
        ({"model_type": "bert", "architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}, "reranker"),
        ({"model_type": "xlm-roberta", "architectures": ["XLMRobertaForSequenceClassification"], "num_labels": 1}, "reranker"),
        ({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}, "unsupported"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "num_labels": 1}, "unsupported"),
        ({"model_type": "brand_new"}, "unsupported"),
        ({"model_type": "../models/llama"}, "unsupported"),
    ],
)
def test_the_kind_follows_from_the_configuration(tmp_path: Path, config: dict[str, Any], kind: str) -> None:
    assert read(write_model(tmp_path / "model", config), "model").kind == kind


def test_an_image_token_and_a_vision_tower_make_a_vision_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", {"model_type": "gemma3", "image_token_index": 5})
    write_safetensors(path / "model.safetensors", VISION_WEIGHTS)
    assert read(path, "model").kind == "vision"


def test_a_headless_text_model_is_an_embedding_model_only_with_sentence_transformers_modules(tmp_path: Path) -> None:
    config = {"model_type": "gemma3_text", "architectures": ["Gemma3TextModel"]}
    assert read(write_model(tmp_path / "bare", config), "bare").kind == "text"
    assert read(write_model(tmp_path / "pooled", config, modules=[]), "pooled").kind == "embedding"
    assert read(write_model(tmp_path / "chat", LLAMA, modules=[]), "chat").kind == "text"


def test_a_text_model_whose_modules_pool_is_an_embedding_model(tmp_path: Path) -> None:
    modules = [{"type": "sentence_transformers.models.Transformer"}, {"type": "sentence_transformers.models.Pooling"}]
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    assert read(write_model(tmp_path / "pooled", config, modules=modules), "pooled").kind == "embedding"
    assert read(write_model(tmp_path / "chat", config), "chat").kind == "text"
    assert read(write_model(tmp_path / "nobody", LLAMA, modules=modules), "nobody").kind == "unsupported"
    assert reason(write_model(tmp_path / "odd", config, modules={})) == "modules.json is not an array"


def test_the_weights_of_an_embedding_models_steps_are_looked_at_too(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", {"model_type": "gemma3_text", "architectures": ["Gemma3TextModel"]}, modules=[])
    (path / "2_Dense").mkdir()
    write_safetensors(path / "2_Dense" / "model.safetensors")
    assert read(path, "model").num_parameters == 16
    (path / "2_Dense" / "model.safetensors").write_bytes(b"x" * 100)
    assert reason(path).startswith("2_Dense/model.safetensors: its header")


def test_what_is_called_an_embedding_model_has_a_module_in_mlx_embeddings() -> None:
    spec = importlib.util.find_spec("mlx_embeddings")
    assert spec is not None
    assert spec.origin is not None
    assert all((Path(spec.origin).parent / "models" / f"{module}.py").is_file() for module in EMBEDDING_MODULES.values())


def test_the_remapped_architectures_are_mlx_lms() -> None:
    assert MODEL_REMAPPING.items() >= SAME_ARCHITECTURE.items()


@pytest.mark.parametrize(
    ("config", "tokenizer", "length"),
    [
        ({"max_position_embeddings": 4096}, {}, 4096),
        ({"text_config": {"max_position_embeddings": 8192}}, {}, 8192),
        ({"max_position_embeddings": 514}, {"model_max_length": 512}, 512),
        ({"max_position_embeddings": 4096}, {"model_max_length": 1_000_000_000_000_000_019_884_624_838_656}, 4096),
        ({"max_position_embeddings": 4096}, {"model_max_length": 1e30}, 4096),
        ({"max_position_embeddings": 4096}, {"model_max_length": 0}, 4096),
        ({}, {"model_max_length": 2048}, 2048),
        ({"max_position_embeddings": True, "text_config": None}, {}, None),
    ],
)
def test_the_context_length_is_the_smallest_limit_that_makes_sense(
    tmp_path: Path, config: dict[str, Any], tokenizer: dict[str, Any], length: int | None
) -> None:
    path = write_model(tmp_path / "model", {"model_type": "llama"} | config, tokenizer_config=tokenizer)
    assert read(path, "model").context_length == length


def test_parameters_of_quantised_weights_are_unpacked(tmp_path: Path) -> None:
    header = {
        "a.weight": {"dtype": "U32", "shape": [8, 8], "data_offsets": [0, 256]},
        "a.scales": {"dtype": "F16", "shape": [8, 1], "data_offsets": [256, 272]},
        "a.biases": {"dtype": "F16", "shape": [8, 1], "data_offsets": [272, 288]},
        "b.weight": {"dtype": "U32", "shape": [8, 16], "data_offsets": [288, 800]},
        "b.scales": {"dtype": "F16", "shape": [8, 1], "data_offsets": [800, 816]},
        "norm.weight": {"dtype": "F16", "shape": [8], "data_offsets": [816, 832]},
    }
    path = write_model(tmp_path / "model", LLAMA | {"quantization": {"group_size": 64, "bits": 4, "b": {"bits": 8}}})
    write_safetensors(path / "model.safetensors", header, bytes(832))
    checkpoint = read(path, "model")
    assert checkpoint.quantization_bits == 4
    assert checkpoint.num_parameters == 8 * 64 + 8 * 64 + 8


def test_shards_add_up(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    (path / "model.safetensors").unlink()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, tensor in zip(shards, "ab", strict=True):
        write_safetensors(path / name, {tensor: WEIGHTS["model.embed_tokens.weight"]})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    checkpoint = read(path, "model")
    assert checkpoint.num_parameters == 16
    assert checkpoint.size_bytes == sum((path / name).stat().st_size for name in shards)
    (path / shards[1]).unlink()
    assert reason(path) == "it is incomplete: 'model-00002-of-00002.safetensors' is missing (1 of 2 files)"
    (path / "model.safetensors.index.json").unlink()
    assert reason(path) == "it is incomplete: 'model-00002-of-00002.safetensors' is missing (1 of 2 files)"


def test_a_shard_outside_the_folder_is_missing(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    write_safetensors(tmp_path / "model.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "'../model.safetensors' is missing" in reason(path)


@pytest.mark.parametrize("key", ["auto_map", "model_file"])
def test_a_model_that_brings_code_is_refused(tmp_path: Path, key: str) -> None:
    assert key in reason(write_model(tmp_path / "model", LLAMA | {key: {"AutoModel": "evil.Model"}}))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.npz"])
def test_weights_that_could_bring_code_are_refused_by_their_name(tmp_path: Path, name: str) -> None:
    path = write_model(tmp_path / "model")
    (path / "model.safetensors").rename(path / name)
    assert reason(path) == f"its weights are in a form that can bring code along ('{name}'), which is never read"


def test_a_folder_of_gguf_files_is_told_apart_from_one_without_weights(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    (path / "model.safetensors").unlink()
    assert reason(path) == "it has no weights (model*.safetensors)"
    (path / "model.gguf").touch()
    assert reason(path) == "its weights are GGUF files, which MLX does not run"
    (path / "config.json").unlink()
    assert reason(path) == "its weights are GGUF files, which MLX does not run"


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    assert reason(tmp_path) == "it has no config.json"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "config.json is not JSON"),
        ("[" * 100_000, "config.json is not JSON"),
        ("[]", "config.json is not an object"),
        ("{}", "config.json names no model_type"),
        ('{"model_type": 3}', "config.json names no model_type"),
    ],
)
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, content: str, expected: str) -> None:
    path = write_model(tmp_path / "model")
    (path / "config.json").write_text(content)
    assert reason(path) == expected


def test_a_bad_weight_file_is_named(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    (path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert reason(path).startswith("model.safetensors: its header")


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    for name in ("config.json", "model.safetensors"):
        (path / name).unlink()
        os.mkfifo(path / name)
    assert reason(path) == "it has no config.json"


@pytest.mark.parametrize("id", ["", ".hidden", "a/b/c", "../a", "a/../b", "a..b", "/a", "a/", "a b", "a\n", "ä", "a:b", "a" * 257])
def test_an_id_that_could_be_a_path_is_refused(tmp_path: Path, id: str) -> None:
    path = write_model(tmp_path / "model")
    with pytest.raises(Unusable, match="its name"):
        read(path, id)


_ATTENTION = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
_ROW = 2 * 2 * 64 * 2  # keys and values of two heads of 64, 16 bits each


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (_ATTENTION, 4 * _ROW),
        ({"text_config": _ATTENTION}, 4 * _ROW),
        (_ATTENTION | {"torch_dtype": "float32"}, 2 * 4 * _ROW),
        ({"text_config": _ATTENTION, "dtype": "float32"}, 2 * 4 * _ROW),
        ({"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 512}, 4 * _ROW * 4),
        ({"n_layer": 4, "n_head": 8, "n_embd": 512, "multi_query": True}, 4 * _ROW // 2),
        (_ATTENTION | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}, 4 * _ROW),
        (_ATTENTION | {"layer_types": ["linear_attention", "full_attention"] * 2}, 2 * _ROW),
        (_ATTENTION | {"layer_types": ["conv", "full_attention", "conv", "conv"]}, _ROW),
        (_ATTENTION | {"num_kv_shared_layers": 1}, 3 * _ROW),
        (_ATTENTION | {"full_attention_interval": 4}, _ROW),
        (_ATTENTION | {"hybrid_override_pattern": "M*-M*-"}, 2 * _ROW),
        (_ATTENTION | {"attn_layer_period": 4, "attn_layer_offset": 3}, _ROW),
        (_ATTENTION | {"block_types": ["recurrent", "attention"]}, 2 * _ROW),
        ({"model_type": "mamba2", "num_hidden_layers": 4}, 0),
        (_ATTENTION | {"model_type": "deepseek_v3", "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 4 * 576 * 2),
        (
            _ATTENTION
            | {"model_type": "deepseek_v2", "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
            4 * 8 * (192 + 128) * 2,
        ),
        ({}, None),
        ({"num_hidden_layers": 4}, None),
        (_ATTENTION | {"num_key_value_heads": [2, 4, 2, 4]}, None),
        (_ATTENTION | {"num_hidden_layers": "four"}, None),
    ],
)
def test_keys_and_values_of_a_token_are_counted_from_the_configuration(config: dict[str, Any], expected: int | None) -> None:
    assert kv_bytes_per_token(config) == expected


def test_what_a_model_keeps_stands_in_its_checkpoint(tmp_path: Path) -> None:
    text = read(write_model(tmp_path / "text", LLAMA | _ATTENTION | {"hidden_size": 512}), "text")
    assert (text.kv_bytes_per_token, text.num_heads) == (4 * _ROW, 8)
    assert text.pass_bytes_per_token is not None
    assert read(write_model(tmp_path / "bare"), "bare").kv_bytes_per_token is None
    assert read(write_model(tmp_path / "bert", BERT), "bert").kv_bytes_per_token == 0


_KEYS = [
    "attn_layer_offset", "attn_layer_period", "block_types", "dtype", "full_attention_interval", "full_attn_idxs", "global_head_dim",
    "head_dim", "hidden_size", "hybrid_override_pattern", "intermediate_size",
    "kv_lora_rank", "layer_group_size", "layer_types", "linear_attn_config",
    "model_type", "multi_query", "num_attention_heads", "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads",
    "num_kv_shared_layers", "qk_nope_head_dim", "qk_rope_head_dim", "text_config", "v_head_dim",
]  # fmt: skip
_VALUES = st.sampled_from(
    [None, True, 0, 1, 3, -2, 10**15, 1.5, "attention", "deepseek_v3", "mamba", [], [1, "full_attention"], {}, {"full_attn_layers": [1]}]
)


@given(st.dictionaries(st.sampled_from(_KEYS), _VALUES), st.booleans())
def test_no_configuration_is_too_odd_to_be_counted(config: dict[str, Any], nested: bool) -> None:
    config = {"text_config": config} if nested else config
    for counted in (kv_bytes_per_token(config), pass_bytes_per_token(config)):
        assert counted is None or counted >= 0
