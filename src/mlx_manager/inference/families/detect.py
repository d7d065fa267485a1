"""config.json and chat template → family."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_manager.inference.families.family import Family, ToolFormat
from mlx_manager.inference.families.gemma import GEMMA
from mlx_manager.inference.families.glm import GLM
from mlx_manager.inference.families.llama import LLAMA
from mlx_manager.inference.families.mistral import MISTRAL
from mlx_manager.inference.families.qwen import QWEN
from mlx_manager.inference.families.tool_formats import arg_tags, json_tags, llama_json, mistral

FAMILIES = (LLAMA, QWEN, MISTRAL, GEMMA, GLM)

# What a chat template says of the tool format, most telling first: models are often fine-tuned away from their family's own.
_TEMPLATE_SIGNS: tuple[tuple[str, ToolFormat], ...] = (
    ("<arg_key>", arg_tags),
    ("[TOOL_CALLS]", mistral),
    ("<tool_call>", json_tags),
    ('"parameters": ', llama_json),
)
_SHORT_CALL_IDS = re.compile(r"length\s*[!=]=\s*9\b")  # Mistral's templates refuse any other


def detect(config: Mapping[str, Any], chat_template: str | Mapping[str, str] | None) -> Family:
    """The family of a checkpoint; one that nobody knows still chats, with what its template (or its several, by name) gives away."""
    model_type = str(config.get("model_type", ""))
    family = next((f for f in FAMILIES if model_type in f.model_types), None)
    template = chat_template if isinstance(chat_template, str) else "\n".join((chat_template or {}).values())
    signs = next((tool_format for sign, tool_format in _TEMPLATE_SIGNS if sign in template), None)
    if family is None:
        family = Family(name=model_type or "unknown", model_types=frozenset())
    return replace(
        family,
        tool_format=signs or family.tool_format,
        thinks=any(tag.open in template for tag in family.reasoning_tags),
        thinking_option=_named("enable_thinking", template),
        effort_option=_named("reasoning_effort", template),
        short_call_ids=_SHORT_CALL_IDS.search(template) is not None,
    )


def _named(option: str, template: str) -> str | None:
    return option if option in template else None
