"""Checkpoints that measure texts, with random weights and the tokenizer of tiny_bert; and a BERT by hand to hold them to."""

import importlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from tests.inference.fixture_models import folder

Json = dict[str, Any]
SMALL: Json = {"vocab_size": 1920, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER: Json = {"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
CONFIGS: dict[str, Json] = {
    "bert": SMALL | {"model_type": "bert", "max_position_embeddings": 512},
    "xlm_roberta": SMALL | {"model_type": "xlm-roberta", "max_position_embeddings": 258, "type_vocab_size": 1, "pad_token_id": 1},
    "modernbert": SMALL | {"model_type": "modernbert", "max_position_embeddings": 512, "num_hidden_layers": 3, "architectures": []},
    "qwen3": SMALL | DECODER | {"model_type": "qwen3", "max_position_embeddings": 512},
    "gemma3_text": SMALL
    | DECODER
    | {"model_type": "gemma3_text", "max_position_embeddings": 512, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "llama_bidirec": SMALL | DECODER | {"model_type": "llama_bidirec", "max_position_embeddings": 512},
}
ENDINGS: dict[str, list[str]] = {"qwen3": ["Qwen3ForCausalLM"], "gemma3_text": ["Gemma3TextModel"]}


def make_encoder(path: Path, module: str, *, scores: bool = False, dtype: mx.Dtype = mx.float32) -> Path:
    """Random weights, as Hugging Face names and places them."""
    config = dict(CONFIGS[module])
    architecture = importlib.import_module(f"mlx_embeddings.models.{module}")
    mx.random.seed(3)
    if scores:
        config |= {"id2label": {"0": "LABEL_0"}, "architectures": [_classifier(module)]}
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    if scores and module == "bert":
        model.classifier = nn.Linear(64, 1)
    if scores and module == "xlm_roberta":
        model.classifier = {"dense": nn.Linear(64, 64), "out_proj": nn.Linear(64, 1)}
        model.pooler = None
    path.mkdir(parents=True)
    weights = {_named(name, module, scores): array.astype(dtype) * 3 for name, array in tree_flatten(model.parameters())}
    steps = {name: array for name, array in weights.items() if name.startswith("dense.")}
    for i, (name, array) in enumerate(steps.items()):  # a folder for each
        (path / f"{2 + i}_Dense").mkdir()
        mx.save_safetensors(str(path / f"{2 + i}_Dense" / "model.safetensors"), {"linear.weight": array})
        del weights[name]
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    if not scores:
        config["architectures"] = ENDINGS.get(module, [f"{module}Model"])
        pooling = {"pooling_mode_lasttoken": True} if module == "qwen3" else {"pooling_mode_mean_tokens": True}
        add_pooling(path, pooling, dense=bool(steps))
    (path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder("tiny_bert") / name, path / name)
    return path


def _classifier(module: str) -> str:
    names = {"bert": "Bert", "xlm_roberta": "XLMRoberta", "modernbert": "ModernBert"}
    return f"{names[module]}ForSequenceClassification"


def _named(name: str, module: str, scores: bool) -> str:
    if module == "modernbert" and not scores:
        return name.removeprefix("model.")
    if scores and module != "modernbert" and not name.startswith("classifier"):
        return {"bert": "bert.", "xlm_roberta": "roberta."}[module] + name
    return name


def add_pooling(path: Path, pooling: Mapping[str, Any], *, dense: bool = False, others: Sequence[str] = ()) -> None:
    """What sentence-transformers writes beside a model."""
    names = ["Transformer", "Pooling", *(["Dense", "Dense"] if dense else []), *others, "Normalize"]
    steps = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    (path / "modules.json").write_text(json.dumps(steps))
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **pooling}))


def copy_of_tiny_bert(path: Path, **config: Any) -> Path:
    shutil.copytree(folder("tiny_bert"), path)
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | config))
    return path


def rename_weights(path: Path, rename: Any) -> None:
    """`rename` gives each weight its new name, or None to leave it out."""
    weights = {rename(name): array for name, array in load_file(path / "model.safetensors").items()}
    save_file({name: array for name, array in weights.items() if name is not None}, path / "model.safetensors")


class BertByHand:
    """In float64 and one text at a time, after the paper and not after anybody's code: position, segment and word, then layers of
    attention and two linear maps, each with the residual normalised."""

    def __init__(self, path: Path) -> None:
        self.config: Json = json.loads((path / "config.json").read_text())
        self.weights = {n.removeprefix("bert."): w.astype(np.float64) for n, w in load_file(path / "model.safetensors").items()}

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def normal(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        eps = self.config.get("layer_norm_eps", 1e-12)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def states(self, tokens: Sequence[int], types: Sequence[int] | None = None) -> np.ndarray:
        w, n, heads = self.weights, len(tokens), self.config["num_attention_heads"]
        size = self.config["hidden_size"] // heads
        x = w["embeddings.word_embeddings.weight"][list(tokens)] + w["embeddings.position_embeddings.weight"][:n]
        x = self.normal(x + w["embeddings.token_type_embeddings.weight"][list(types or [0] * n)], "embeddings.LayerNorm")
        for i in range(self.config["num_hidden_layers"]):
            at = f"encoder.layer.{i}"
            q, k, v = (
                self.linear(x, f"{at}.attention.self.{part}").reshape(n, heads, size).transpose(1, 0, 2)
                for part in ("query", "key", "value")
            )
            scores = np.exp(q @ k.transpose(0, 2, 1) / math.sqrt(size))
            attended = (scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(n, -1)
            x = self.normal(x + self.linear(attended, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
            wide = self.linear(x, f"{at}.intermediate.dense")
            wide = wide * 0.5 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
            x = self.normal(x + self.linear(wide, f"{at}.output.dense"), f"{at}.output.LayerNorm")
        return x

    def score(self, tokens: Sequence[int], types: Sequence[int]) -> float:
        pooled = np.tanh(self.linear(self.states(tokens, types)[0], "pooler.dense"))
        (logit,) = self.linear(pooled, "classifier")
        return float(1 / (1 + np.exp(-logit)))


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
