"""Families that see, without a trained fixture: mlx-vlm's own models, tiny, with random weights of a fixed seed."""

import importlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

VOCABULARY = 300
IMAGE, BEGIN, END = 290, 291, 292

_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1000,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_PATCHES: dict[str, Any] = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 128, "num_heads": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_MROPE = {"type": "default", "mrope_section": [8, 4, 4]}
_DEEP: dict[str, Any] = {**_PATCHES, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}
_SQUARES: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "patch_size": 4, "image_size": 16,
}  # fmt: skip
_IDS: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": 293, "vision_start_token_id": BEGIN, "vision_end_token_id": END}


@dataclass(frozen=True, slots=True)
class Family:
    """`text`, `vision` and `own` are what its configurations say; `arrays` what its processor makes of the pixels [H, W, 3] of a picture,
    and `num_tokens` how many tokens stand for them. `axis` is along which the pixels of several pictures are joined, `cache` the one that
    it is expected to get on the CPU."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    own: Mapping[str, Any]
    arrays: Callable[[np.ndarray], dict[str, np.ndarray]]
    num_tokens: Callable[[np.ndarray], int]
    axis: int = 0
    cache: str = "slots"


def _patches(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """As Qwen's processors: patches of 4 x 4 pixels, twice in time, those that are merged beside each other."""
    height, width = pixels.shape[0] // 4, pixels.shape[1] // 4
    frames = np.broadcast_to(pixels.transpose(2, 0, 1)[None], (2, 3, *pixels.shape[:2]))
    cut = frames.reshape(2, 3, height // 2, 2, 4, width // 2, 2, 4).transpose(2, 5, 3, 6, 1, 0, 4, 7)
    return {"pixel_values": cut.reshape(height * width, -1).copy(), "image_grid_thw": np.array([[1, height, width]])}


def _square(pixels: np.ndarray) -> dict[str, np.ndarray]:
    return {"pixel_values": pixels[:16, :16].transpose(2, 0, 1)[None].copy()}


def _quarter_of_patches(pixels: np.ndarray) -> int:
    return pixels.shape[0] * pixels.shape[1] // 64


FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(
        {"rope_scaling": _MROPE},
        {**_PATCHES, "window_size": 16, "fullatt_block_indexes": [1]},
        _IDS,
        _patches,
        _quarter_of_patches,
    ),
    "qwen3_vl": Family({"rope_scaling": _MROPE, "head_dim": 32}, _DEEP, _IDS, _patches, _quarter_of_patches),
    "qwen3_vl_moe": Family(
        {
            "rope_scaling": _MROPE, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "moe_intermediate_size": 32,
        },
        _DEEP,
        _IDS,
        _patches,
        _quarter_of_patches,
    ),
    "llava": Family(
        {"model_type": "llama"},
        {**_SQUARES, "model_type": "clip_vision_model"},
        {"image_token_index": IMAGE, "vision_feature_layer": -2},
        _square,
        lambda _: 16,
    ),
    "pixtral": Family(
        {"model_type": "mistral", "head_dim": 32},
        {**_SQUARES, "head_dim": 16},
        {"image_token_index": IMAGE},
        _square,
        lambda _: 16,
    ),
    "mistral3": Family(
        {"model_type": "mistral", "head_dim": 32, "rope_parameters": {"rope_theta": 10_000.0}},
        {**_SQUARES, "head_dim": 16, "model_type": "pixtral"},
        {"image_token_index": IMAGE},
        lambda pixels: {**_square(pixels), "image_sizes": np.array([[16, 16]])},
        lambda _: 4,
    ),
    "idefics3": Family(
        {},
        {**_SQUARES, "model_type": "idefics3_vision"},
        {"image_token_id": IMAGE},
        lambda pixels: {"pixel_values": _square(pixels)["pixel_values"][None]},
        lambda _: 4,
        axis=1,
    ),
    "gemma3": Family(
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32, "sliding_window_pattern": 2, "mm_tokens_per_image": 16},
        {**_SQUARES, "model_type": "siglip_vision_model"},
        {"image_token_index": IMAGE, "hidden_size": 128},
        _square,
        lambda _: 16,
    ),
    "smolvlm": Family(
        {},
        {**_SQUARES, "model_type": "siglip_vision_model"},
        {"image_token_id": IMAGE},
        lambda pixels: {"pixel_values": _square(pixels)["pixel_values"][None]},
        lambda _: 4,
        axis=1,
    ),
    "qwen3_5": Family(
        {
            "head_dim": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 4, "full_attention_interval": 2,
            "rope_parameters": {"type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        },
        {**_DEEP, "deepstack_visual_indexes": []},
        _IDS,
        _patches,
        _quarter_of_patches,
        cache="single",  # its states are of a kind that mlx-vlm alone has
    ),
}  # fmt: skip


@cache
def tiny(architecture: str) -> Any:
    family = FAMILIES[architecture]
    return _built(architecture, {**_TEXT, **family.text}, family.vision, {"vocab_size": VOCABULARY, **family.own})


@cache
def tiny_paligemma() -> Any:
    """It sees its whole prompt both ways, which no engine with chunks can do."""
    text = {**_TEXT, "model_type": "gemma", "head_dim": 32, "query_pre_attn_scalar": 32, "num_image_tokens": 16}
    text["use_bidirectional_attention"] = True
    vision = {**_SQUARES, "model_type": "siglip_vision_model", "projection_dim": 128}
    return _built("paligemma", text, vision, {"image_token_index": IMAGE, "hidden_size": 128, "vocab_size": VOCABULARY})


def _built(architecture: str, text: Mapping[str, Any], vision: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    module = importlib.import_module(f"mlx_vlm.models.{architecture}")
    text_config = module.TextConfig.from_dict({"model_type": architecture, **text})
    vision_config = module.VisionConfig(**{"model_type": architecture, **vision})
    model = module.Model(module.ModelConfig(text_config=text_config, vision_config=vision_config, model_type=architecture, **own))
    mx.random.seed(7)

    def weight(old: mx.array) -> mx.array:
        if not mx.issubdtype(old.dtype, mx.floating):
            return old
        return mx.random.normal(old.shape) / math.sqrt(old.size // old.shape[0]) if old.ndim > 1 else old

    model.update(tree_map(weight, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


class Processor:
    """What stands between a picture and a family's model: its arrays, and marks before and after its tokens."""

    boi_token = "<image>"
    tokenizer = SimpleNamespace(bos_token_id=None)

    def __init__(self, architecture: str) -> None:
        self._family = FAMILIES[architecture]

    def __call__(self, *, text: list[str], images: list[Any], return_tensors: str) -> dict[str, np.ndarray]:
        pixels = np.asarray(images[0], np.float32) / 127.5 - 1
        tokens = [BEGIN, *[IMAGE] * self._family.num_tokens(pixels), END]
        return {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(tokens)), int), **self._family.arrays(pixels)}


def joined(architecture: str, arrays: list[Mapping[str, np.ndarray]]) -> dict[str, mx.array]:
    """The arrays of several pictures in one prompt, as a processor would give them."""
    axis = FAMILIES[architecture].axis
    return {name: mx.array(np.concatenate([a[name] for a in arrays], axis=axis if name == "pixel_values" else 0)) for name in arrays[0]}


def write_qwen(path: Path, architecture: str, spoken: Path) -> None:
    """A folder with a model of Qwen's, which reads and looks as the Qwen2-VL fixture in folder `spoken` does."""
    family = FAMILIES[architecture]
    said = json.loads((spoken / "config.json").read_text())
    ids = {name: said[name] for name in _IDS}
    text = {**_TEXT, **family.text, "model_type": architecture, "vocab_size": 608, "tie_word_embeddings": False}
    vision = {**family.vision, "model_type": architecture, "patch_size": 14, "window_size": 56}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(spoken / name, path)
    looks = json.loads((spoken / "preprocessor_config.json").read_text())
    looks["processor_class"] = {"qwen2_5_vl": "Qwen2_5_VLProcessor"}.get(architecture, "Qwen3VLProcessor")
    (path / "preprocessor_config.json").write_text(json.dumps(looks))
    config = {**text, **ids, "eos_token_id": said["eos_token_id"], "vision_config": vision}
    config |= {} if architecture == "qwen2_5_vl" else {"text_config": text}
    _write(path, config, _built(architecture, text, vision, {"vocab_size": 608, **ids}))


_GEMMA_TEMPLATE = """{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message.role }}
{% for part in message.content %}{{ '<start_of_image>' if part.type == 'image' else part.text }}{% endfor %}<end_of_turn>
{% endfor %}<start_of_turn>model
"""


def write_gemma3(path: Path, spoken: Path) -> None:
    """A folder with a Gemma 3, which reads as the Gemma 3 text fixture in folder `spoken` does, and looks with Gemma's own processor."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds

    marks = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer: Any = AutoTokenizer.from_pretrained(spoken, extra_special_tokens=marks)
    tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text(_GEMMA_TEMPLATE)
    looks = {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 16, "width": 16},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(looks))
    (path / "processor_config.json").write_text(json.dumps({"processor_class": "Gemma3Processor", "image_seq_length": 16}))
    family = FAMILIES["gemma3"]
    text = {**_TEXT, **family.text, "model_type": "gemma3_text", "vocab_size": len(tokenizer), "sliding_window": 64}
    own = {"image_token_index": tokenizer.image_token_id, "hidden_size": 128, "vocab_size": len(tokenizer)}
    config = {"model_type": "gemma3", **own, "text_config": text, "vision_config": family.vision}
    _write(path, config, _built("gemma3", text, family.vision, own))


def _write(path: Path, config: Mapping[str, Any], model: Any) -> None:
    (path / "config.json").write_text(json.dumps(config))
    weights: Any = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
