"""What a model folder holds, from its JSON and the headers of its weights. Nothing is loaded, and no code of the folder's runs."""

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from mlx_manager.hub.safetensors import BadHeader, Tensor, read_header

Kind = Literal["text", "vision", "embedding", "reranker", "unsupported"]

ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
MAX_ID_LENGTH = 256
MAX_JSON_BYTES = 100_000_000
CODE_KEYS = ("auto_map", "model_file")
"""Keys of config.json that name Python files to import."""
ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "modernbert", "nomic_bert"})
EMBEDDING_MODULES = {
    "bert": "bert",
    "xlm-roberta": "xlm_roberta",
    "modernbert": "modernbert",
    "gemma3_text": "gemma3_text",
    "qwen3": "qwen3",
    "llama_bidirec": "llama_bidirec",
}
"""The module of mlx-embeddings that makes one vector of a text, by model type."""
CROSS_ENCODERS = frozenset({"bert", "xlm-roberta", "modernbert"})
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".npy", ".npz")
"""Endings of weights that may run code when they are read."""
SAME_ARCHITECTURE = {
    "mistral": "llama",
    "phi-msft": "phixtral",
    "falcon_mamba": "mamba",
    "kimi_k2": "deepseek_v3",
    "minimax_m2": "minimax",
    "iquestcoder": "llama",
    "gemma4_unified": "gemma4",
}
"""Model types that mlx-lm serves with another one's module: the text models of its `MODEL_REMAPPING`, which is not read because
importing mlx-lm imports MLX. A type missing here is shown as unsupported."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA or DoRA adapter: small matrices beside the linear layers of a model."""

    name: str
    path: Path
    """Of its folder; no link on the way."""
    file: Path
    """Its arrays; no link on the way."""
    form: Literal["mlx-lm", "peft"]
    """Whose names and shapes the arrays have."""
    rank: int
    scale: float
    """What the product of its matrices is multiplied with."""
    base: str | None
    """What it calls the model that it was trained on."""
    size_bytes: int
    num_parameters: int
    created: int
    """Unix time of its configuration."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder that can be used, or that only lacks a program for its architecture (`unsupported`). With an adapter on top it is
    another model of its own, called `base:adapter`."""

    id: str
    path: Path
    kind: Kind
    architecture: str
    """`model_type` of config.json."""
    context_length: int | None
    """Tokens; None where the folder does not say."""
    size_bytes: int
    """Of the weight files."""
    quantization_bits: int | None
    """Of most weights; None if they are not quantised."""
    num_parameters: int
    """From the shapes, quantised weights unpacked: an estimate."""
    created: int
    """Unix time of config.json."""
    kv_bytes_per_token: int | None = None
    """Keys and values of one token in all layers; 0 for what keeps none, None where the folder does not say."""
    pass_bytes_per_token: int | None = None
    """What a forward pass holds of one token beside them; None where the folder does not say."""
    num_heads: int | None = None
    """Queries that attend beside each other, each with scores of its own."""
    adapter: Adapter | None = None

    @property
    def base_id(self) -> str:
        """The id of the model without its adapter; no model's own id has a colon."""
        return self.id.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Traits:
    """What is told by the configuration and the names of the weights. The fields are those of `Checkpoint`."""

    kind: Kind
    architecture: str
    context_length: int | None
    quantization_bits: int | None
    kv_bytes_per_token: int | None
    pass_bytes_per_token: int | None
    num_heads: int | None

    def checkpoint(self, id: str, path: Path, *, size_bytes: int, num_parameters: int, created: int) -> Checkpoint:
        return Checkpoint(
            id=id,
            path=path,
            kind=self.kind,
            architecture=self.architecture,
            context_length=self.context_length,
            size_bytes=size_bytes,
            quantization_bits=self.quantization_bits,
            num_parameters=num_parameters,
            created=created,
            kv_bytes_per_token=self.kv_bytes_per_token,
            pass_bytes_per_token=self.pass_bytes_per_token,
            num_heads=self.num_heads,
        )


class Unusable(Exception):
    """A verdict on a folder: why it cannot be used, without its path."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def is_valid_id(model_id: str) -> bool:
    return len(model_id) <= MAX_ID_LENGTH and ".." not in model_id and ID.fullmatch(model_id) is not None


def read(path: Path, id: str) -> Checkpoint:
    """The checkpoint in a folder, whose file names and contents are not trusted. Raises Unusable."""
    if not is_valid_id(id):
        raise Unusable("its name may hold letters, digits, '.', '_' and '-' only, and begins with a letter or digit")
    try:
        return _read(path, id)
    except OSError as error:
        raise Unusable(f"{Path(error.filename or path).name}: {error.strerror}") from error


def _read(path: Path, id: str) -> Checkpoint:
    config = read_json(path / "config.json")
    if config is None:
        raise Unusable(no_config(file.name for file in sorted(path.iterdir())))
    check_config(config)
    files = _weight_files(path)
    tensors = _read_tensors(files)
    tokenizer_config = read_json(path / "tokenizer_config.json") or {}
    traits = read_traits(config, tokenizer_config, tensors, _read_array(path / "modules.json"))
    if traits.kind in ("embedding", "reranker"):
        tensors |= _read_steps(path)
    return traits.checkpoint(
        id,
        path,
        size_bytes=sum(file.stat().st_size for file in files),
        num_parameters=num_parameters(tensors, config),
        created=int((path / "config.json").stat().st_mtime),
    )


def no_config(names: Iterable[str]) -> str:
    """Why a folder of these files is no model that could be loaded."""
    return no_weights([".gguf"]) if any(name.endswith(".gguf") for name in names) else "it has no config.json"


def check_config(config: Mapping[str, Any]) -> str:
    """The architecture. Raises Unusable for a configuration that names none, or that brings code along."""
    for key in CODE_KEYS:
        if key in config:
            raise Unusable(f"it brings code of its own ({key} in config.json), which is never run")
    architecture = config.get("model_type")
    if not isinstance(architecture, str):
        raise Unusable("config.json names no model_type")
    return architecture


def read_traits(
    config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], tensor_names: Iterable[str], steps: Sequence[Any] | None
) -> Traits:
    """What kind of model it is, here or on the Hub: the one place where that is decided. Raises Unusable.

    `tensor_names` are those of its weights, `steps` what modules.json lists, None if there is no such file."""
    architecture = check_config(config)
    kind = _kind(config, architecture, tensor_names, steps)
    return Traits(
        kind=kind,
        architecture=architecture,
        context_length=_context_length(config, tokenizer_config),
        quantization_bits=_positive(_quantization(config).get("bits")),
        kv_bytes_per_token=0 if kind in ("embedding", "reranker") else kv_bytes_per_token(config),
        pass_bytes_per_token=pass_bytes_per_token(config),
        num_heads=_first(_text(config), "num_attention_heads", "n_head", "num_heads"),
    )


def chat_template(jinja: str | None, tokenizer_config: Mapping[str, Any]) -> str:
    """All of a model's chat templates, from the file of that name or its tokenizer's configuration; "" if it has none."""
    if jinja is not None:
        return jinja
    given: object = tokenizer_config.get("chat_template")
    named = cast(list[object], given) if isinstance(given, list) else [{"template": given}]
    return "\n".join(text for one in named if isinstance(text := _object(one).get("template"), str))


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is no such file. Raises Unusable."""
    value = _read_value(path)
    if value is not None and not isinstance(value, dict):
        raise Unusable(f"{path.name} is not an object")
    return cast(dict[str, Any] | None, value)


def _read_array(path: Path) -> list[Any] | None:
    value = _read_value(path)
    if value is not None and not isinstance(value, list):
        raise Unusable(f"{path.name} is not an array")
    return cast(list[Any] | None, value)


def _read_value(path: Path) -> object:
    """What JSON is in a file; None if there is no such file. A pipe or a device is not opened: reading it might never end."""
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_JSON_BYTES:
        raise Unusable(f"{path.name} is too large")
    try:
        value: object = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{path.name} is not JSON") from error
    return False if value is None else value  # a null is no object either


def _weight_files(path: Path) -> list[Path]:
    """`model*.safetensors`, which is what loaders read, once all are there: by the index or, since a download may stop
    before it, by the numbers in their names."""
    files = {file.name: file for file in sorted(path.glob("model*.safetensors")) if file.is_file()}
    index = read_json(path / "model.safetensors.index.json") or {}
    weight_map = _object(index.get("weight_map"))
    expected = {str(name) for name in weight_map.values()}
    if not expected:
        series = {numbers.groups() for name in files if (numbers := re.fullmatch(r"(.*-)\d{5}-of-(\d{5})\.safetensors", name))}
        expected = {f"{start}{shard:05d}-of-{last}.safetensors" for start, last in series for shard in range(1, int(last) + 1)}
    if missing := sorted(expected - files.keys()):
        raise Unusable(f"it is incomplete: {missing[0][:100]!r} is missing ({len(missing)} of {len(expected)} files)")
    if not files:
        raise Unusable(no_weights(file.name for file in sorted(path.iterdir())))
    return list(files.values())


def no_weights(names: Iterable[str]) -> str:
    """Why a model of these files has no weights that could be loaded."""
    for name in names:
        if name.endswith(PICKLES):
            return f"its weights are in a form that can bring code along ({name[:100]!r}), which is never read"
        if name.endswith(".gguf"):
            return "its weights are GGUF files, which MLX does not run"
    return "it has no weights (model*.safetensors)"


def _read_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= read_header(file)
        except BadHeader as error:
            raise Unusable(f"{file.name}: {error}") from error
    return tensors


def layer_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each layer's `weight`, unpacked if it is quantised. Raises Unusable."""
    try:
        quantization = _quantization(read_json(path / "config.json") or {})
        tensors = _read_tensors(_weight_files(path))
    except OSError as error:
        raise Unusable(f"{Path(error.filename or path).name}: {error.strerror}") from error
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "weight" and tensor.shape:
            *rest, last = tensor.shape
            is_packed = f"{layer}.scales" in tensors
            shapes[layer] = (*rest, last * 32 // _bits(layer, quantization) if is_packed else last)
    return shapes


def _read_steps(path: Path) -> dict[str, Tensor]:
    """The weights of the steps that follow an embedding model's layers. Each has a folder; its loader reads what is in any."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.rglob("model*.safetensors")):
        if file.parent != path and file.is_file():
            name = str(file.relative_to(path))
            try:
                tensors |= {f"{name}/{tensor}": entry for tensor, entry in read_header(file).items()}
            except BadHeader as error:
                raise Unusable(f"{name[:100]}: {error}") from error
    return tensors


def _kind(config: Mapping[str, Any], architecture: str, tensors: Iterable[str], steps: Sequence[Any] | None) -> Kind:
    """Vision before text: families such as gemma3 and mistral3 are served by mlx-lm too, without their eyes. An image token alone
    does not make a vision model, since a text model cut out of one keeps it. `steps` are those of modules.json: of sentence-transformers'
    models, some have the architecture of a text model."""
    has_image_token = "image_token_id" in config or "image_token_index" in config
    if isinstance(config.get("vision_config"), dict) or (has_image_token and any("vision" in n or "visual" in n for n in tensors)):
        return "vision"
    architectures = config.get("architectures")
    names = [str(name) for name in cast(list[object], architectures)] if isinstance(architectures, list) else None
    if names and any(name.endswith("ForSequenceClassification") for name in names):
        return "reranker" if architecture in CROSS_ENCODERS and _num_labels(config) == 1 else "unsupported"
    is_headless = names is not None and all(name.endswith("Model") for name in names)
    pools = any(str(_object(step).get("type")).endswith(".Pooling") for step in steps or ())
    if architecture in ENCODERS or pools or (is_headless and steps is not None):
        return "embedding" if architecture in EMBEDDING_MODULES else "unsupported"
    return "text" if _mlx_lm_has(SAME_ARCHITECTURE.get(architecture, architecture)) else "unsupported"


def _num_labels(config: Mapping[str, Any]) -> int:
    """Of a classifier; transformers' default is 2."""
    labels = config.get("id2label")
    return len(cast(dict[str, Any], labels)) if isinstance(labels, dict) else _positive(config.get("num_labels")) or 2


def _mlx_lm_has(architecture: str) -> bool:
    """Whether mlx-lm brings a module of that name. Its files are looked at: importing it, or finding a submodule, imports MLX."""
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folders = [Path(folder) / "models" for folder in spec.submodule_search_locations]
    return re.fullmatch(r"[\w.-]+", architecture) is not None and any((folder / f"{architecture}.py").is_file() for folder in folders)


def _context_length(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> int | None:
    """The model's positions or, if less, what its tokenizer says; tokenizers without a limit say 1e30."""
    positions = _positive(config.get("max_position_embeddings"))
    if positions is None:
        positions = _positive(_object(config.get("text_config")).get("max_position_embeddings"))
    limit = _positive(tokenizer_config.get("model_max_length"))
    known = [length for length in (positions, limit) if length is not None and length < 1_000_000_000]
    return min(known, default=None)


_RECURRENT = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv7"})
_LATENT = frozenset(
    {
        "bailing_hybrid", "bailing_moe_v3", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_k2", "kimi_k3",
        "kimi_linear", "kimi_vl", "longcat_flash", "longcat_flash_ngram", "mistral4", "youtu_llm",
    }
)  # fmt: skip
"""Model types that keep what keys and values are made from: one row for all heads."""
_MOST_LAYERS = 10_000


def kv_bytes_per_token(config: Mapping[str, Any]) -> int | None:
    """Keys and values of one token in all layers that keep any, 16 bits each unless config.json says float32. None if it cannot be told.

    A layer with a sliding window counts like the others: its blocks are kept as long as theirs. Layers that keep a state instead do not
    count: it is the same size for any number of tokens.
    """
    text = _text(config)
    architecture = str(text.get("model_type", config.get("model_type")))
    if architecture in _RECURRENT:
        return 0
    layers = _num_attending(text)
    if layers is None:
        return None
    element_bytes = _element_bytes(config)
    if (latent := _positive(text.get("kv_lora_rank"))) is not None:
        rope = _positive(text.get("qk_rope_head_dim"))
        if rope is None:
            return None
        if architecture in _LATENT:
            per_layer = 2 if architecture.startswith("longcat") else 1
            return layers * per_layer * (latent + rope) * element_bytes
        heads, plain, value = (_positive(text.get(n)) for n in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
        if heads is None or plain is None:
            return None
        return layers * heads * (plain + rope + (plain if value is None else value)) * element_bytes
    heads, size = _kv_heads(text), _head_dim(text)
    if heads is None or size is None:
        return None
    width = layers * heads * size
    if (wide := _positive(text.get("global_head_dim"))) is not None and (types := _layer_types(text)) is not None:
        num_wide = sum(kind == "full_attention" for kind in types[:layers])
        width = (layers - num_wide) * heads * size + num_wide * (_positive(text.get("num_global_key_value_heads")) or heads) * wide
    return 2 * width * element_bytes


def pass_bytes_per_token(config: Mapping[str, Any]) -> int | None:
    """About what is in memory at the widest place of a layer: the states around it, its queries, keys and values, and what its
    widest part makes."""
    text = _text(config)
    hidden = _first(text, "hidden_size", "n_embd", "d_model", "dim")
    if hidden is None:
        return None
    inner = _first(text, "intermediate_size", "n_inner", "d_inner") or 4 * hidden
    experts = (_first(text, "num_experts_per_tok", "num_experts_per_token", "top_k_experts") or 0) * (
        _positive(text.get("moe_intermediate_size")) or inner
    )
    queries = (_first(text, "num_attention_heads", "n_head") or 1) * (_head_dim(text) or hidden)
    return _element_bytes(config) * (8 * hidden + 3 * max(inner, experts) + 3 * min(queries, 16 * hidden))


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part that says how text is read and written."""
    return _object(config.get("text_config")) or dict(config)


def _num_attending(text: Mapping[str, Any]) -> int | None:
    """How many layers keep keys and values of their own."""
    layers = _first(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if layers is None or layers > _MOST_LAYERS:
        return None
    layers = max(0, layers - (_positive(text.get("num_kv_shared_layers")) or 0))
    if (types := _layer_types(text)) is not None:
        return sum("attention" in kind and "linear" not in kind for kind in types[:layers])
    if isinstance(pattern := text.get("hybrid_override_pattern"), str):
        return pattern.count("*")
    if isinstance(indices := text.get("full_attn_idxs"), list):
        return len(cast(list[Any], indices))
    if isinstance(indices := _object(text.get("linear_attn_config")).get("full_attn_layers"), list):
        return len(cast(list[Any], indices))
    if (period := _positive(text.get("attn_layer_period"))) is not None:
        offset = text.get("attn_layer_offset")
        return sum(i % period == offset for i in range(layers))
    if (interval := _positive(text.get("full_attention_interval"))) is not None:
        return layers // interval
    if (size := _positive(text.get("layer_group_size"))) is not None:
        return sum((i + 1) % size == 0 or i >= layers // size * size for i in range(layers))
    if isinstance(kinds := text.get("block_types", text.get("_block_types")), list):
        names = cast(list[Any], kinds)
        return sum(names[i % len(names)] == "attention" for i in range(layers)) if names else None
    return layers


def _layer_types(text: Mapping[str, Any]) -> list[str] | None:
    types = text.get("layer_types")
    return [str(kind) for kind in cast(list[object], types)] if isinstance(types, list) else None


def _kv_heads(text: Mapping[str, Any]) -> int | None:
    if text.get("multi_query") is True:
        return 1
    return _first(text, "num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_attention_heads", "n_head", "n_heads")


def _head_dim(text: Mapping[str, Any]) -> int | None:
    if (size := _first(text, "head_dim", "attention_head_dim")) is not None:
        return size
    hidden = _first(text, "hidden_size", "n_embd", "d_model", "dim")
    heads = _first(text, "num_attention_heads", "n_head", "n_heads")
    return None if hidden is None or heads is None else hidden // heads


def _element_bytes(config: Mapping[str, Any]) -> int:
    text = _text(config)
    said = next((c[k] for c in (text, config) for k in ("dtype", "torch_dtype") if isinstance(c.get(k), str)), "bfloat16")
    return 4 if said == "float32" else 2


def _first(values: Mapping[str, Any], *names: str) -> int | None:
    """Of the first of these that is a positive number; None if there is one that is something else, as a list of one for each layer."""
    for name in names:
        if values.get(name) is not None:
            return _positive(values[name])
    return None


def _quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """MLX's own entry, else the one other tools write: {"bits", "group_size", <module>: {"bits"}}."""
    return _object(config.get("quantization")) or _object(config.get("quantization_config"))


def num_parameters(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> int:
    """Quantised weights are packed into 32-bit words beside their scales and biases, which are no parameters."""
    quantization = _quantization(config)
    total = 0
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        is_packed = f"{module}.scales" in tensors
        if not is_packed:
            total += tensor.num_elements
        elif part == "weight":
            total += tensor.num_elements * 32 // _bits(module, quantization)
    return total


def _bits(module: str, quantization: Mapping[str, Any]) -> int:
    """Of a packed weight."""
    return _positive(_object(quantization.get(module)).get("bits")) or _positive(quantization.get("bits")) or 32


def _object(value: object) -> dict[str, Any]:
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
