"""What an adapter's folder holds and which model it fits, from JSON and the headers of its arrays. Nothing is loaded.

Two forms are read: mlx-lm's own, and PEFT's where it means exactly the same (its matrices are the transposed ones). Whatever else an
adapter changes has no place here, so it is refused rather than left out.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from mlx_manager.hub.checkpoint import Adapter, Checkpoint, Unusable, is_valid_id, layer_shapes, read_json
from mlx_manager.hub.safetensors import BadHeader, read_header

Form = Literal["mlx-lm", "peft"]
Part = Literal["lora_a", "lora_b", "m"]
Layers = dict[str, dict[Part, tuple[int, ...]]]
"""The shapes of the arrays of each layer, as mlx-lm has them."""

CONFIG = "adapter_config.json"
FILES: Mapping[Form, str] = {"mlx-lm": "adapters.safetensors", "peft": "adapter_model.safetensors"}
FLOATS = frozenset({"F16", "BF16", "F32"})
_MAX_RANK = 1 << 16
_MAX_SCALE = 1e6
_PREFIX = "base_model.model."
_PARTS: Mapping[Form, Mapping[str, Part]] = {
    "mlx-lm": {".lora_a": "lora_a", ".lora_b": "lora_b", ".m": "m"},
    "peft": {
        ".lora_A.weight": "lora_a",
        ".lora_B.weight": "lora_b",
        ".lora_magnitude_vector": "m",
        ".lora_magnitude_vector.weight": "m",
    },
}
# What PEFT writes down that changes nothing of what an adapter does once it is trained, or that its arrays say as well.
_PEFT_INERT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
        "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision",
        "runtime_config", "target_modules", "use_dora",
    }
)  # fmt: skip
_PEFT_READ = frozenset({"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights"})
_PEFT_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the weights of the model as well


def read_adapter(path: Path, root: Path) -> Adapter:
    """The adapter in a folder, whose names and contents are not trusted; no link in it may lead out of `root`. Raises Unusable."""
    if not is_valid_id(path.name) or "/" in path.name:
        raise Unusable("its name may hold letters, digits, '.', '_' and '-' only, and begins with a letter or digit")
    try:
        return _read(path.name, _inside(path, root), root)
    except OSError as error:
        raise Unusable(f"{Path(error.filename or path).name}: {error.strerror}") from error


def _inside(path: Path, root: Path) -> Path:
    """Where a path leads. Raises Unusable if that is outside, and OSError if it is nowhere."""
    try:
        real = path.resolve(strict=True)
    except RuntimeError as error:  # links in a circle, before Python 3.13
        raise Unusable(f"{path.name} is a link that leads nowhere") from error
    if not real.is_relative_to(root.resolve()):
        raise Unusable(f"{path.name} is a link that leads out of the folder")
    return real


def _read(name: str, path: Path, root: Path) -> Adapter:
    config_file = _inside(path / CONFIG, root) if (path / CONFIG).is_file() else None
    config = None if config_file is None else read_json(config_file)
    if config_file is None or config is None:
        raise Unusable(f"it has no {CONFIG}")
    form: Form = "peft" if "peft_type" in config else "mlx-lm"
    rank, scale = _read_peft(config) if form == "peft" else _read_mlx_lm(config)
    if not (path / FILES[form]).is_file():
        raise Unusable(f"it has no {FILES[form]}")
    file = _inside(path / FILES[form], root)
    layers = read_layers(file, form)
    base = config.get("base_model_name_or_path" if form == "peft" else "model")
    if {"m" in parts for parts in layers.values()} != {_is_dora(config)}:
        raise Unusable(f"its {CONFIG} and its arrays do not agree whether it is DoRA")
    for layer, parts in layers.items():
        if parts["lora_a"][1] != rank:  # of [inputs, rank], or of [experts, rank, inputs]
            raise Unusable(f"{layer[:100]!r} does not have the rank {rank}, as {CONFIG} has it")
    return Adapter(
        name=name,
        path=path,
        file=file,
        form=form,
        rank=rank,
        scale=scale,
        base=base if isinstance(base, str) else None,
        size_bytes=file.stat().st_size,
        num_parameters=sum(math.prod(shape) for parts in layers.values() for shape in parts.values()),
        created=int(config_file.stat().st_mtime),
    )


def _read_mlx_lm(config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and scale. What else is in the file is of the training."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise Unusable(f"it is no LoRA or DoRA adapter (fine_tune_type {str(kind)[:40]!r})")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise Unusable(f"its {CONFIG} has no lora_parameters")
    named = cast(dict[str, Any], parameters)
    return _rank(named.get("rank"), "lora_parameters.rank"), _number(named.get("scale"), "lora_parameters.scale")


def _read_peft(config: Mapping[str, Any]) -> tuple[int, float]:
    if config["peft_type"] != "LORA":
        raise Unusable(f"it is no LoRA adapter (peft_type {str(config['peft_type'])[:40]!r})")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise Unusable(f"it is for another task (task_type {str(config['task_type'])[:40]!r})")
    if config.get("bias") not in (None, "none"):
        raise Unusable("it changes biases")
    if config.get("init_lora_weights", True) not in _PEFT_STARTS:
        raise Unusable(f"it belongs to changed weights of its model (init_lora_weights {str(config['init_lora_weights'])[:40]!r})")
    for key, value in config.items():
        if key not in _PEFT_INERT | _PEFT_READ and value:
            raise Unusable(f"it needs {key[:40]!r}, which is not supported")
    rank, alpha = _rank(config.get("r"), "r"), _number(config.get("lora_alpha"), "lora_alpha")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)


def _is_dora(config: Mapping[str, Any]) -> bool:
    return config.get("fine_tune_type") == "dora" or config.get("use_dora") is True


def _rank(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_RANK:
        raise Unusable(f"{name} in its {CONFIG} is no rank")
    return value


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MAX_SCALE:
        raise Unusable(f"{name} in its {CONFIG} is no number")
    return float(value)


def place(name: str, form: Form) -> tuple[str, Part] | None:
    """The layer that an array belongs to, and what it is there; None if it is nothing that an adapter has."""
    if form == "peft":
        if not name.startswith(_PREFIX):
            return None
        name = name.removeprefix(_PREFIX)
    return next(((name.removesuffix(end), part) for end, part in _PARTS[form].items() if name.endswith(end)), None)


def read_layers(file: Path, form: Form) -> Layers:
    """What is in an adapter's file. Raises Unusable and OSError."""
    try:
        tensors = read_header(file)
    except BadHeader as error:
        raise Unusable(f"{file.name}: {error}") from error
    layers: Layers = {}
    for name, tensor in tensors.items():
        found = place(name, form)
        if found is None:
            raise Unusable(f"{name[:100]!r} is nothing that LoRA adds to a linear layer")
        if tensor.dtype not in FLOATS:
            raise Unusable(f"{name[:100]!r} has the type {tensor.dtype}")
        layer, part = found
        layers.setdefault(layer, {})[part] = tensor.shape[::-1] if form == "peft" else tensor.shape
    if not layers:
        raise Unusable("it has no arrays")
    for layer, parts in layers.items():
        if not {"lora_a", "lora_b"} <= parts.keys() or len(parts["lora_a"]) not in (2, 3):
            raise Unusable(f"{layer[:100]!r} lacks one of its two matrices")
    return layers


def check_fit(adapter: Adapter, base: Checkpoint, shapes_of: Callable[[Path], Mapping[str, tuple[int, ...]]] = layer_shapes) -> None:
    """Raises Unusable unless everything that the adapter changes is a linear layer of the model, of the same size."""
    if base.kind != "text":
        raise Unusable(f"{base.base_id} is {'an' if base.kind[0] in 'aeiou' else 'a'} {base.kind} model; adapters are for text models")
    known = shapes_of(base.path)
    try:
        layers = read_layers(adapter.file, adapter.form)
    except OSError as error:
        raise Unusable(f"{adapter.file.name}: {error.strerror}") from error
    for layer, parts in layers.items():
        expected = _expected(known.get(layer, ()), adapter.rank)
        if expected is None:
            raise Unusable(f"{layer[:100]!r} is no linear layer of {base.base_id}")
        for part, shape in parts.items():
            if shape != expected.get(part):
                raise Unusable(
                    f"{layer[:100]!r} has another size in {base.base_id}: {part} is {list(shape)}, not {list(expected.get(part, ()))}"
                )


def _expected(weight: tuple[int, ...], rank: int) -> dict[Part, tuple[int, ...]] | None:
    """Of a linear layer, or of one for each of several experts."""
    match weight:
        case (outputs, inputs):
            return {"lora_a": (inputs, rank), "lora_b": (rank, outputs), "m": (outputs,)}
        case (experts, outputs, inputs):
            return {"lora_a": (experts, rank, inputs), "lora_b": (experts, outputs, rank)}
        case _:
            return None
