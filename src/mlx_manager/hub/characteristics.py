"""What a model is, as far as it can be told without its weights, and the filters by that. Pure."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from mlx_manager.hub.checkpoint import Checkpoint

Abilities = Callable[[Mapping[str, Any], str], tuple[bool, bool]]
"""From config.json and chat template: whether it calls tools, and whether it reasons."""
Capability = Literal["text", "vision", "embedding", "reranker", "tools", "thinking"]


@dataclass(frozen=True, slots=True)
class Characteristics:
    """`download_bytes` is what is fetched of it, all files; None for one that is here."""

    checkpoint: Checkpoint
    tools: bool
    thinking: bool
    download_bytes: int | None = None

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What it can be asked for; a model that sees writes as well."""
        kind = self.checkpoint.kind
        told: list[Capability] = []
        if kind in ("text", "vision"):
            told.append("text")
        if kind != "text" and kind != "unsupported":
            told.append(kind)
        if self.tools:
            told.append("tools")
        if self.thinking:
            told.append("thinking")
        return tuple(told)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """None: not asked for. `fits` needs a verdict, which is decided elsewhere. Their order is that in which they are applied."""

    architecture: str | None = None
    capability: tuple[Capability, ...] = ()
    bits: int | None = None
    """0: not quantised."""
    max_bytes: int | None = None
    """Of the weights."""
    max_parameters: int | None = None
    min_context: int | None = None
    fits: bool | None = None

    @property
    def active(self) -> tuple[str, ...]:
        return tuple(f.name for f in fields(self) if getattr(self, f.name) not in (None, ()))


def fails(asked: Filter, told: Characteristics, fits: bool) -> tuple[str, ...]:
    """The names of the filters that a model does not pass, in their order."""
    c = told.checkpoint
    verdicts = {
        "architecture": asked.architecture is None or c.architecture.lower() == asked.architecture.lower(),
        "capability": set(asked.capability) <= set(told.capabilities),
        "bits": asked.bits is None or (0 if c.quantization_bits is None else c.quantization_bits) == asked.bits,
        "max_bytes": asked.max_bytes is None or c.size_bytes <= asked.max_bytes,
        "max_parameters": asked.max_parameters is None or c.num_parameters <= asked.max_parameters,
        "min_context": asked.min_context is None or (c.context_length is not None and c.context_length >= asked.min_context),
        "fits": asked.fits is None or fits == asked.fits,
    }
    return tuple(name for name, passed in verdicts.items() if not passed)


def emptied_by(asked: Filter, failed: Iterable[tuple[str, ...]]) -> str | None:
    """The filter after which nothing is left, from what each model fails; None if something is, or nothing was there before."""
    left = list(failed)
    if not left:
        return None
    for name in asked.active:
        left = [names for names in left if name not in names]
        if not left:
            return name
    return None
