"""config.json and chat template → family."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_manager.inference.families.deepseek import DEEPSEEK
from mlx_manager.inference.families.family import BRACKETS, LONGCAT_THINK, THOUGHT, Family, ToolFormat
from mlx_manager.inference.families.gemma import GEMMA, GEMMA4
from mlx_manager.inference.families.glm import GLM
from mlx_manager.inference.families.gptoss import GPT_OSS
from mlx_manager.inference.families.kimi import KIMI
from mlx_manager.inference.families.lfm import LFM
from mlx_manager.inference.families.llama import LLAMA
from mlx_manager.inference.families.longcat import LONGCAT
from mlx_manager.inference.families.minimax import MINIMAX
from mlx_manager.inference.families.mistral import MISTRAL
from mlx_manager.inference.families.qwen import QWEN, QWEN35
from mlx_manager.inference.families.tool_formats import braced, json_tags, llama_json, marked, marked_pythonic, mistral, tagged

FAMILIES = (LLAMA, QWEN, QWEN35, MISTRAL, GEMMA, GEMMA4, GLM, DEEPSEEK, GPT_OSS, KIMI, MINIMAX, LFM, LONGCAT)

# What a chat template says of the tool format, most telling first: models are often fine-tuned away from their family's own.
_TEMPLATE_SIGNS: tuple[tuple[str, ToolFormat], ...] = (
    ("<minimax:tool_call>", tagged.MINIMAX),
    ("<|tool_call>", braced.GEMMA4),
    ("<start_function_call>", braced.FUNCTION_GEMMA),
    ("<longcat_tool_call>", tagged.LONGCAT),
    ("｜DSML｜", tagged.DSML),
    ("<arg_key>", tagged.ARG_TAGS),
    ("<|tool_call_start|>", marked_pythonic),
    ("<parameter=", tagged.FUNCTION_TAGS),
    ("<param name=", tagged.FUNCTION_NAMES),
    ("<|tool_calls_section_begin|>", marked.KIMI),
    ("<｜tool▁calls▁begin｜>", marked.DEEPSEEK),
    ("[TOOL_CALLS]", mistral),
    ("<tool_call>", json_tags),
    ('"parameters": ', llama_json),
)
_TEMPLATE_TAGS = (BRACKETS, THOUGHT, LONGCAT_THINK)  # told by templates of any family; the others every family knows
_CHANNELS = "<|channel|>"
# `thinking` as a switch, not as a part of another word.
_THINKING = re.compile(r"\bif (?:not )?thinking\b|(?<![.\w])thinking is (?:not )?defined")
_THINKING_BLOCK = re.compile(r"[\"']type[\"']\] == [\"']thinking[\"']")
_TOOLS = re.compile(r"\btools\b")
_SHORT_CALL_IDS = re.compile(r"length\s*[!=]=\s*9\b")  # Mistral's templates refuse any other


def detect(config: Mapping[str, Any], chat_template: str | Mapping[str, str] | None) -> Family:
    """The family of a checkpoint; one that nobody knows still chats, with what its template (or its several, by name) gives away."""
    model_type = str(config.get("model_type", ""))
    family = next((f for f in FAMILIES if model_type in f.model_types), None)
    template = chat_template if isinstance(chat_template, str) else "\n".join((chat_template or {}).values())
    signs = next((tool_format for sign, tool_format in _TEMPLATE_SIGNS if sign in template), None)
    if family is None:
        family = Family(name=model_type or "unknown", model_types=frozenset())
    channels = _CHANNELS in template or (family.channels and not template)
    told = tuple(tag for tag in _TEMPLATE_TAGS if tag.open in template and tag not in family.reasoning_tags)
    tags = () if channels else (*family.reasoning_tags, *told)
    return replace(
        family,
        tool_format=signs or family.tool_format,
        reasoning_tags=tags,
        channels=channels,
        thinks=channels or any(tag.open in template for tag in tags),
        thinking_option=_named("enable_thinking", template) or ("thinking" if _THINKING.search(template) else None),
        effort_option=_named("reasoning_effort", template),
        reasoning_blocks=_THINKING_BLOCK.search(template) is not None,
        short_call_ids=_SHORT_CALL_IDS.search(template) is not None,
    )


def calls_and_thinks(config: Mapping[str, Any], chat_template: str) -> tuple[bool, bool]:
    """Whether a model calls tools and reasons, as far as its template lets guess."""
    family = detect(config, chat_template)
    return calls_by(family, chat_template), family.thinks


def calls_by(family: Family, chat_template: str) -> bool:
    """Whether this model calls tools: a format may be its family's own, of which this checkpoint's template knows nothing."""
    return _TOOLS.search(chat_template) is not None and (family.tool_format is not None or family.channels)


def _named(option: str, template: str) -> str | None:
    return option if option in template else None
