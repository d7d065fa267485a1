"""What a model can do, and how that is known."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from mlx_manager.core.requests import ReasoningOption

Capability = Literal["tools", "thinking", "thinking_switch", "vision"]
CAPABILITIES: tuple[Capability, ...] = get_args(Capability)


@dataclass(frozen=True, slots=True)
class Ability:
    """`guessed` from the model's files; `verified` if it was asked and did it; `failed` if it was asked and did not. `detail` says what
    was seen; `found_at` is the Unix time of the asking."""

    supported: bool
    status: Literal["guessed", "verified", "failed"] = "guessed"
    detail: str = ""
    found_at: int | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of asking a model. `fingerprint` is that of its files then: of others it says nothing."""

    verified: bool
    detail: str
    fingerprint: str
    found_at: int


@dataclass(frozen=True, slots=True)
class Abilities:
    """`thinking_switch`: it can be told to think, and not to. `tool_format` is the mark that begins its calls, "" for one without;
    `options` of what can be said of reasoning have an effect."""

    tools: Ability
    thinking: Ability
    thinking_switch: Ability
    vision: Ability
    tool_format: str | None = None
    options: tuple[ReasoningOption, ...] = ()


def with_findings(guessed: Abilities, findings: Mapping[Capability, Finding], fingerprint: str) -> Abilities:
    """What was found in the place of what was guessed, as far as it was found with the same files."""
    found = {
        capability: Ability(finding.verified, "verified" if finding.verified else "failed", finding.detail, finding.found_at)
        for capability, finding in findings.items()
        if finding.fingerprint == fingerprint
    }
    return replace(guessed, **found)
