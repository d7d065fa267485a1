"""What happened to one request, told once, at its end, to whoever keeps count (metrics, spans; later the audit log)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mlx_manager.core.events import Timing, Usage

Operation = Literal["generate", "embeddings", "rerank"]
Outcome = Literal["ok", "client_error", "server_error", "cancelled"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """`asked` is the name in the request, `model` what it stands for. `backend` is None when nobody got to answer. `duration_s` runs from
    the gateway's first look to the last event."""

    asked: str
    model: str
    backend: str | None
    outcome: Outcome
    duration_s: float
    usage: Usage
    timing: Timing | None = None
    error: str | None = None
    operation: Operation = "generate"


ExchangeListener = Callable[[Exchange], None]
