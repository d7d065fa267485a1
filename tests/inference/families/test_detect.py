"""What config.json and the chat template give away."""

import re
from pathlib import Path
from typing import Any

import pytest

from mlx_manager.inference.families.detect import FAMILIES, detect
from mlx_manager.inference.families.family import BRACKETS, REASONING, THINK, THOUGHT
from mlx_manager.inference.families.tool_formats import braced, json_tags, llama_json, marked, mistral, tagged
from tests.inference.fixture_models import SHARED

FORMATS: dict[str, Any] = {
    "deepseek/hfjs-deepseek-ai-DeepSeek-R1": marked.DEEPSEEK,
    "deepseek/deepseek-ai-DeepSeek-V3.1": marked.DEEPSEEK,
    "deepseek/deepseek-ai-DeepSeek-V3.2": tagged.DSML,
    "gemma/google-gemma-4-31B-it": braced.GEMMA4,
    "gemma/vllm-tool_chat_template_functiongemma": braced.FUNCTION_GEMMA,
    "glm/GLM-4.6": tagged.ARG_TAGS,
    "glm/GLM-4.7-Flash": tagged.ARG_TAGS,
    "hermes/NousResearch-Hermes-3-Llama-3.1-8B-tool_use": json_tags,
    "llama/meta-llama-Llama-3.2-3B-Instruct": llama_json,
    "mistral/Mistral-Small-3.2-24B-Instruct-2506": mistral,
    "other/ibm-granite-granite-4.0": json_tags,
    "other/Kimi-K2-Instruct": marked.KIMI,
    "other/MiniMax-M2": tagged.MINIMAX,
    "qwen/Qwen-Qwen3-0.6B": json_tags,
    "qwen/Qwen3-Coder": tagged.FUNCTION_TAGS,
    "qwen/Qwen3.5-4B": tagged.FUNCTION_TAGS,
}


@pytest.mark.requirement("ADAPT-06")
@pytest.mark.parametrize("name", FORMATS)
def test_a_template_tells_the_format_whatever_the_model_calls_itself(name: str) -> None:
    path = SHARED / "data" / "templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip("../shared is not there")
    template = path.read_text(encoding="utf-8")
    for model_type in ("qwen3", "nobody's"):
        assert detect({"model_type": model_type}, template).tool_format is FORMATS[name]


def test_a_template_that_writes_functions_with_parameters_by_name_tells_that_format() -> None:
    template = '{%- if tools %}Answer as <function name="f"><param name="p">value</param></function>.{%- endif %}'
    assert detect({"model_type": "llama"}, template).tool_format is tagged.FUNCTION_NAMES


def test_the_documentation_names_each_model_type() -> None:
    table = (Path(__file__).parents[3] / "docs" / "families.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        for model_type in family.model_types:
            assert re.search(rf"[|,] {re.escape(model_type)}[ ,]", table), model_type


def test_each_model_type_is_of_one_family() -> None:
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_family_without_a_template_is_itself(family: Any) -> None:
    for model_type in family.model_types:
        found = detect({"model_type": model_type}, None)
        assert (found.name, found.tool_format, found.channels) == (family.name, family.tool_format, family.channels)


def test_an_unknown_family_has_no_tools_and_the_usual_thoughts() -> None:
    family = detect({"model_type": "nobody's"}, "{{ messages }}")
    assert (family.name, family.tool_format, family.thinks) == ("nobody's", None, False)
    assert family.reasoning_tags == (THINK, REASONING)
    assert detect({}, None).name == "unknown"


def test_channels_and_tags_of_thought_are_told_by_templates() -> None:
    channels = detect({"model_type": "nobody's"}, "{{ '<|start|>assistant<|channel|>analysis<|message|>' }}")
    assert (channels.channels, channels.thinks, channels.reasoning_tags) == (True, True, ())
    assert BRACKETS in detect({"model_type": "qwen3"}, "[THINK]").reasoning_tags
    assert detect({"model_type": "gemma4"}, "<|channel>thought").reasoning_tags == (THOUGHT,)
    assert detect({"model_type": "llama"}, "<think>").thinks


@pytest.mark.parametrize(
    ("template", "option"),
    [
        ("{% if enable_thinking %}x{% endif %}", "enable_thinking"),
        ("{% if not thinking is defined %}{% set thinking = false %}{% endif %}", "thinking"),
        ("{% if thinking %}<think>{% endif %}", "thinking"),
        ("{% if message.thinking is defined %}x{% endif %}", None),
        ("{# if thinkingly #}{{ '<thinking>' }}", None),
    ],
)
def test_the_switch_for_thinking_is_found_by_its_name(template: str, option: str | None) -> None:
    assert detect({"model_type": "x"}, template).thinking_option == option
