"""How the next token is chosen: the fields that every protocol has, or takes as an extension."""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field

from mlx_manager.core.requests import Sampling
from mlx_manager.protocols.fields import Schema


class SamplingFields(Schema):
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None


class BiasedSamplingFields(SamplingFields):
    logit_bias: (
        Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = None


def sampling(wire: SamplingFields) -> Sampling:
    bias = wire.logit_bias if isinstance(wire, BiasedSamplingFields) else None
    return Sampling(
        temperature=wire.temperature,
        top_p=wire.top_p,
        top_k=wire.top_k,
        min_p=wire.min_p,
        repetition_penalty=wire.repetition_penalty,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        seed=wire.seed,
        logit_bias=MappingProxyType({int(token): b for token, b in (bias or {}).items()}),
    )


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """None was not said."""
    return None if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def sampling_fields(wanted: Sampling) -> dict[str, Any]:
    """The same as fields; None is absent."""
    fields = {name: getattr(wanted, name) for name in SamplingFields.model_fields}
    return fields | {"logit_bias": {str(token): bias for token, bias in wanted.logit_bias.items()} or None}
