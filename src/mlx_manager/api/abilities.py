"""What models can do, as everybody is told: guessed from their files, or found by asking them."""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import BaseModel

from mlx_manager.api.dependencies import Services
from mlx_manager.core.capabilities import Abilities, Ability
from mlx_manager.hub.checkpoint import Checkpoint
from mlx_manager.inference.abilities import abilities
from mlx_manager.protocols.openai.schema import OPTION_FIELDS


class AbilityView(BaseModel):
    """`guessed` from the model's files; `verified` or `failed` when it was asked, at `found_at` (Unix time), with what was seen."""

    supported: bool
    status: Literal["guessed", "verified", "failed"]
    detail: str
    found_at: int | None

    @classmethod
    def of(cls, ability: Ability) -> "AbilityView":
        return cls(supported=ability.supported, status=ability.status, detail=ability.detail, found_at=ability.found_at)


class AbilitiesView(BaseModel):
    """`tool_format` is the mark that begins a call, "" for one without; `options` are the fields of a chat request that its template, or
    the server for it, has a use for."""

    tools: AbilityView
    thinking: AbilityView
    thinking_switch: AbilityView
    vision: AbilityView
    tool_format: str | None
    options: list[str]

    @classmethod
    def of(cls, told: Abilities) -> "AbilitiesView":
        return cls(
            tools=AbilityView.of(told.tools),
            thinking=AbilityView.of(told.thinking),
            thinking_switch=AbilityView.of(told.thinking_switch),
            vision=AbilityView.of(told.vision),
            tool_format=told.tool_format,
            options=[OPTION_FIELDS[option] for option in told.options],
        )


async def abilities_of(services: Services, checkpoints: Iterable[Checkpoint]) -> Mapping[str, AbilitiesView]:
    """By id, of the models that write. Their files are read beside the event loop."""
    asked = [(c, services.findings.of(c.id)) for c in checkpoints if c.kind in ("text", "vision")]
    return await asyncio.to_thread(lambda: {c.id: AbilitiesView.of(abilities(c, found)) for c, found in asked})
