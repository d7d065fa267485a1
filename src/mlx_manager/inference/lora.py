"""Adapters on top of a model: a layer of mlx-lm's tuner around a linear layer, whose own arrays stay as they are and can be shared."""
# pyright: basic

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from mlx_manager.hub.adapters import Part, place
from mlx_manager.hub.checkpoint import Adapter

_ADAPTED = (LoRALinear, LoRASwitchLinear, DoRALinear)


def base_arrays(model: nn.Module) -> dict[str, mx.array]:
    """A model's own arrays, by their names without any adapter."""
    adapted = {name for name, module in model.named_modules() if isinstance(module, _ADAPTED)}
    arrays: dict[str, mx.array] = {}
    flat: Any = tree_flatten(model.parameters())
    for name, array in flat:
        layer, _, part = name.rpartition(".")
        outer, _, inner = layer.rpartition(".")
        if inner == "linear" and outer in adapted:
            arrays[f"{outer}.{part}"] = array
        elif layer not in adapted:
            arrays[name] = array
    return arrays


def apply(adapter: Adapter, model: nn.Module) -> None:
    """Puts an adapter, which must fit, on a model."""
    parts: dict[str, dict[Part, mx.array]] = {}
    loaded: Any = mx.load(str(adapter.file))
    for name, array in loaded.items():
        found = place(name, adapter.form)
        assert found is not None, "it has been checked"
        parts.setdefault(found[0], {})[found[1]] = array.T if adapter.form == "peft" else array
    modules = dict(model.named_modules())
    model.update_modules(tree_unflatten([(name, _adapted(modules, name, arrays, adapter)) for name, arrays in parts.items()]))
    model.eval()  # the new layers are in training, and would drop some of what comes in
    mx.eval(model.parameters())


def _adapted(modules: dict[str, Any], name: str, arrays: dict[Part, mx.array], adapter: Adapter) -> nn.Module:
    layer = modules.get(name)
    match layer:
        case nn.Linear() | nn.QuantizedLinear():
            kind: Any = DoRALinear if "m" in arrays else LoRALinear
        case SwitchLinear() | QuantizedSwitchLinear():
            kind = LoRASwitchLinear
        case None:
            raise ValueError(f"the adapter changes {name}, which the model calls otherwise once it is loaded")
        case _:
            raise ValueError(f"the adapter changes {name}, which is no linear layer but a {type(layer).__name__}")
    adapted = kind.from_base(layer, r=adapter.rank, scale=adapter.scale, dropout=0.0)
    for part, array in arrays.items():
        adapted[part] = array
    return adapted
