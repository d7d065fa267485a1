"""A checkpoint that measures texts → its forward pass: a vector for each text, or a score for each pair of them.

The layers are mlx-embeddings'. What comes after them is here, by the checkpoint's own configuration: which states make the vector, and
the head of a cross-encoder. No code of a checkpoint runs, only safetensors are read, and nothing is downloaded. Device thread only.
"""
# ruff: noqa: PLC0415 - importing mlx-embeddings takes a second
# pyright: basic

import importlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from mlx_manager.hub.checkpoint import EMBEDDING_MODULES, Kind

Pooling = Literal["mean", "cls", "last", "own"]

# How sentence-transformers spells these in the configuration of its pooling, in one word or as one switch each.
_WORDS: Mapping[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_SWITCHES: Mapping[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_sqrt_len_tokens": "mean",  # another length, which does not matter: vectors are given the length 1
}
# Where a checkpoint says nothing. The module of gemma3_text does all of it itself: mean, two dense layers.
_DEFAULTS: Mapping[str, Pooling] = {"qwen3": "last", "gemma3_text": "own"}
# Heads that say something else than what a text means.
_HEADS = ("cls.", "lm_head.", "head.", "decoder.", "classifier.", "qa_outputs.")
_PREFIXES = ("bert.", "roberta.")


class UnsupportedEncoder(Exception):
    """Its text says what of the checkpoint cannot be done."""


class Encoder:
    """`kind` says which of the two it makes. Vectors have the length 1; scores are from 0 to 1."""

    def __init__(self, path: Path, kind: Kind) -> None:
        config = _read_json(path / "config.json")
        self._module = EMBEDDING_MODULES[config["model_type"]]
        self._scores = kind == "reranker"
        self._pooling = _classifier_pooling(config) if self._scores else read_pooling(path, config)
        self._model = _load(path, self._module, config, scores=self._scores)
        self._dtype = _float_type(self._model)

    @property
    def weight_bytes(self) -> int:
        from mlx.utils import tree_flatten

        return sum(array.nbytes for _, array in cast(list[Any], tree_flatten(self._model.parameters())))

    def wait(self) -> None:
        """Until the device has done what others gave it."""
        import mlx.core as mx

        mx.synchronize()

    def __call__(self, tokens: np.ndarray, mask: np.ndarray, types: np.ndarray) -> np.ndarray:
        """All three are rows x columns, padded on the right; `mask` is 1 where there is a token. Rows x float32."""
        import mlx.core as mx

        ids, present = mx.array(tokens), mx.array(mask)
        if self._pooling == "own":
            vectors = self._model(ids, attention_mask=present.astype(self._dtype)).text_embeds
        else:
            states = self._states(ids, present, mx.array(types))
            vectors = _POOLINGS[self._pooling](states, present)
        vectors = vectors.astype(mx.float32)
        if self._scores:
            vectors = mx.sigmoid(self._model.score(vectors.astype(self._dtype)).astype(mx.float32))
        else:
            vectors = vectors / mx.maximum(mx.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        mx.eval(vectors)
        return np.array(vectors)

    def _states(self, ids: Any, present: Any, types: Any) -> Any:
        """The last layer's states. The mask's type is what the module computes with."""
        mask = present.astype(self._dtype)
        match self._module:
            case "bert":
                return self._model(ids, token_type_ids=types, attention_mask=mask).last_hidden_state
            case "modernbert":
                return self._model.model(ids, attention_mask=mask)["last_hidden_state"]  # its own call pools what it gives back
            case "qwen3":
                return self._model.model(ids, attention_mask=present)  # its own call takes no mask of floats, and pools
            case _:
                return self._model(ids, attention_mask=mask).last_hidden_state


def read_pooling(path: Path, config: Mapping[str, Any]) -> Pooling:
    """Which states make the vector, as modules.json of sentence-transformers says. Raises `UnsupportedEncoder`."""
    module = EMBEDDING_MODULES[config["model_type"]]
    default = _DEFAULTS.get(module, "mean")
    steps = json.loads(text) if (text := _read_text(path / "modules.json")) else []
    pooling: Pooling | None = None
    for step in steps:
        name = str(step.get("type", "")).rpartition(".")[2]
        match name:
            case "Pooling":
                pooling = _pooling_of_step(path, step)
            case "Transformer" | "Normalize":
                pass
            case "Dense" if default == "own":
                pass
            case _:
                raise UnsupportedEncoder(f"its step '{name[:64]}' is not supported")
    return default if pooling is None or default == "own" else pooling


def _pooling_of_step(path: Path, step: Mapping[str, Any]) -> Pooling:
    folder = str(step.get("path", ""))
    if not re.fullmatch(r"[\w-]+", folder):
        raise UnsupportedEncoder("its step 'Pooling' has no folder of its own")
    config = _read_json(path / folder / "config.json")
    if isinstance(word := config.get("pooling_mode"), str):
        pooling = _WORDS.get(word)
    else:
        on = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
        pooling = _SWITCHES.get(on[0]) if len(on) == 1 else None
    if pooling is None:
        raise UnsupportedEncoder("it pools in a way that is not supported: mean, first and last token are")
    return pooling


def _classifier_pooling(config: Mapping[str, Any]) -> Pooling:
    """What the head of a cross-encoder looks at: the first token, or as ModernBERT's configuration says."""
    if EMBEDDING_MODULES[config["model_type"]] == "modernbert" and config.get("classifier_pooling", "cls") == "mean":
        return "mean"
    return "cls"


def _mean(states: Any, present: Any) -> Any:
    import mlx.core as mx

    weights = present[:, :, None].astype(mx.float32)
    return (states.astype(mx.float32) * weights).sum(axis=1) / weights.sum(axis=1)


def _first(states: Any, present: Any) -> Any:
    return states[:, 0]


def _last(states: Any, present: Any) -> Any:
    import mlx.core as mx

    return states[mx.arange(states.shape[0]), present.sum(axis=1) - 1]


_POOLINGS: Mapping[str, Callable[[Any, Any], Any]] = {"mean": _mean, "cls": _first, "last": _last}


def _load(path: Path, module: str, config: Mapping[str, Any], *, scores: bool) -> Any:
    """The model with its weights, which lie in this folder and the folders of its steps."""
    from mlx_embeddings.utils import load_model

    def classes(config: Mapping[str, Any]) -> Any:
        return built, architecture.ModelArgs, None, None

    architecture = importlib.import_module(f"mlx_embeddings.models.{module}")
    built = _scoring(architecture, module, config) if scores else _vectors_only(architecture)
    # ModernBERT's model makes its head by the name of the architecture.
    names = {"architectures": ["ModernBertForSequenceClassification"], "id2label": {"0": ""}} if scores else {"architectures": []}
    return load_model(path, model_config=names, get_model_classes=classes)


def _vectors_only(architecture: Any) -> Any:
    class Bare(architecture.Model):
        """Without heads, whatever the checkpoint was made for."""

        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            kept = {_without_prefix(name): array for name, array in weights.items()}
            kept = {name: array for name, array in kept.items() if not name.startswith(_HEADS)}
            if getattr(self, "pooler", None) is not None:  # of which nothing here is made, and which some come without
                self.pooler = _nothing
                kept = {name: array for name, array in kept.items() if not name.startswith("pooler.")}
            return super().sanitize(kept)

    return Bare


def _scoring(architecture: Any, module: str, config: Mapping[str, Any]) -> Any:
    """A cross-encoder: the score follows from the pooled state."""
    import mlx.core as mx
    import mlx.nn as nn

    class Head(nn.Module):
        """XLM-R's."""

        def __init__(self, size: int) -> None:
            super().__init__()
            self.dense = nn.Linear(size, size)
            self.out_proj = nn.Linear(size, 1)

        def __call__(self, states: Any) -> Any:
            return self.out_proj(mx.tanh(self.dense(states)))

    class Scoring(architecture.Model):
        pooler: Any

        def __init__(self, args: Any) -> None:
            super().__init__(args)
            if module == "bert":
                self.classifier = nn.Linear(config["hidden_size"], 1)
            elif module == "xlm_roberta":
                self.pooler = None
                self.classifier = Head(config["hidden_size"])

        def score(self, pooled: Any) -> Any:
            match module:
                case "bert":
                    return self.classifier(mx.tanh(self.pooler.dense(pooled)))
                case "modernbert":
                    return self.classifier(self.head(pooled))
                case _:
                    return self.classifier(pooled)

        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            return super().sanitize({_without_prefix(name): array for name, array in weights.items()})

    return Scoring


def _nothing(states: Any) -> None:
    return None


def _without_prefix(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)


def _float_type(model: Any) -> Any:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    arrays: list[Any] = [array for _, array in tree_flatten(model.parameters())]
    return next(array.dtype for array in arrays if mx.issubdtype(array.dtype, mx.floating))


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _read_json(path: Path) -> Mapping[str, Any]:
    text = _read_text(path)
    return json.loads(text) if text is not None else {}
