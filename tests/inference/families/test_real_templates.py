"""Real templates with real tokenizers: a conversation with tools renders, what the template makes of a reply reads back as that reply,
and a second turn begins with the tokens of the first."""

import copy
import json
import lzma
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Message, ToolCall
from mlx_manager.core.requests import Conversation, Reasoning, ToolSpec
from mlx_manager.inference.families.detect import detect
from mlx_manager.inference.families.family import Family
from mlx_manager.inference.families.prompt import PromptRenderer, Rendered
from mlx_manager.inference.families.sections import splitter_for
from tests.inference.families.test_sections import told
from tests.inference.fixture_models import SHARED

DATA = SHARED / "data"
TEMPLATES = sorted((DATA / "templates").glob("*/*.jinja"))
# By the folder of the templates: the model_type of their checkpoints, and the tokenizer, or the nearest that is there.
MODELS = {
    "deepseek": ("deepseek_v3", "deepseek_v3"),
    "gemma": ("gemma3", "gemma3"),
    "glm": ("glm4_moe", "qwen3"),
    "gptoss": ("gpt_oss", "qwen3"),
    "hermes": ("llama", "llama3_2"),
    "llama": ("llama", "llama3_2"),
    "mistral": ("mistral", "mistral_nemo"),
    "other": ("another", "qwen3"),
    "qwen": ("qwen3", "qwen3"),
}
pytestmark = pytest.mark.skipif(not TEMPLATES, reason="../shared is not there")

WEATHER = ToolSpec(
    "get_weather",
    "The weather in a city",
    {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
)
ARGUMENTS = '{"city": "Paris", "days": 2}'
ASKED = Message("user", "Weather, please?")
CALLED = Message("assistant", "", tool_calls=(ToolCall("abcdefghi", "get_weather", ARGUMENTS),))
THOUGHT_AND_CALLED = Message("assistant", "", tool_calls=CALLED.tool_calls, reasoning="I need it.")
RESULT = Message("tool", "22 degrees", tool_call_id="abcdefghi", name="get_weather")
SAID = Message("assistant", "It is sunny.")
THOUGHT_AND_SAID = Message("assistant", "It is sunny.", reasoning="So it is.")
AGAIN = Message("user", "And tomorrow?")

# What ends a reply in one template or another.
ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|tool_response>", "</s>"),
    *(
        "<|user|>",
        "<|observation|>",
        "<|end|>",
        "[e~[",
        "<｜end▁of▁sentence｜>",
        "<｜tool▁outputs▁begin｜>",
        "[Round",
        "<end_of_utterance>",
    ),
)
CHANNEL_ENDS = ("<|call|>", "<|start|>user")
CASES = {
    "call": ((ASKED,), CALLED, (RESULT,)),
    "answer": ((ASKED,), SAID, (AGAIN,)),
    "end": ((ASKED, CALLED, RESULT), SAID, (AGAIN,)),
    "thought, call": ((ASKED,), THOUGHT_AND_CALLED, (RESULT,)),
    "thought, answer": ((ASKED,), THOUGHT_AND_SAID, (AGAIN,)),
    "thought, end": ((ASKED, THOUGHT_AND_CALLED, RESULT), THOUGHT_AND_SAID, (AGAIN,)),
}
THOUGHTLESS = {name for name in CASES if "thought" not in name}
FORGETS = {"thought, answer", "thought, end"}
# Where the template itself breaks it: by template, the cases that do not hold, and why.
KNOWS_NO_CALLS = "it knows no calls, and leaves them out"
BREAKS: dict[str, tuple[set[str], str]] = {
    "fireworks-ai-llama-3-firefunction-v2": (set(CASES), "it refuses all: wants variables of its own"),
    "llama-cpp-deepseek-r1": (set(CASES), "it refuses all with tools: wants a mapping of tools by name"),
    "hfjs-HuggingFaceTB-SmolVLM-Instruct": (set(CASES), "content in parts only"),
    **dict.fromkeys(
        ("gemma-7b-it", "google-gemma-2-2b-it", "google-gemma-3-it"), ({"call", "end"}, "it refuses tools: roles must alternate")
    ),
    "Mistral-Large-Instruct-2411-v7": ({"call", "end"}, "it refuses tool messages"),
    "Kimi-K2-Instruct": ({"call", "end"}, "it appends to a list, which no template may"),
    **dict.fromkeys(
        ("glm-4-9b-chat", "glm-edge", "Llama-3-8B-Instruct", "microsoft-Phi-3.5-mini-instruct", "hfjs-Qwen-Qwen2.5-VL-7B-Instruct"),
        ({"call"}, KNOWS_NO_CALLS),
    ),
    "HuggingFaceTB-SmolLM3-3B": ({"call", "thought, call"} | FORGETS, KNOWS_NO_CALLS),
    "vllm-tool_chat_template_gemma3_pythonic": ({"call"}, "no comma between arguments"),
    "vllm-tool_chat_template_llama3.2_pythonic": ({"call"}, "text without quotation marks"),
    "vllm-tool_chat_template_llama4_pythonic": ({"call"}, "numbers in quotation marks"),
    "vllm-tool_chat_template_functiongemma": ({"call"}, "numbers as text"),
    "vllm-tool_chat_template_glm4": ({"call"}, KNOWS_NO_CALLS),
    **dict.fromkeys(
        (
            *("NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use"),
            "vllm-tool_chat_template_hermes",
        ),
        ({"end"}, "a line end after results that are not the last"),
    ),
    "vllm-tool_chat_template_llama4_json": ({"answer", "end"}, "a line end before the prompt's last tag"),
    "vllm-tool_chat_template_deepseekv3": (set(CASES), "white space of its own spelling"),
    "vllm-tool_chat_template_deepseekv31": (set(CASES) - {"end"}, "white space of its own spelling"),
    **dict.fromkeys(
        (
            *("Mistral-Large-Instruct-2407-v3", "Mistral-Small-3.2-24B-Instruct-2506", "mistralai-Mistral-Nemo-Instruct-2407"),
            *("hfjs-CISCai-Mistral-7B-Instruct-v0.3-SOTA-GGUF", "tokenizer_config-Mistral-Nemo"),
            *("vllm-tool_chat_template_mistral", "vllm-tool_chat_template_mistral3"),
        ),
        ({"answer", "end"}, "the tools move to the newest message"),
    ),
    "vllm-tool_chat_template_mistral_parallel": (set(CASES), "the tools, and instructions, move to the newest message"),
    **dict.fromkeys(
        ("GLM-4.6", "openai-gpt-oss-120b", "Qwen-Qwen3-0.6B", "tokenizer_config-Qwen3"), (FORGETS, "thoughts before the newest question go")
    ),
    **dict.fromkeys(
        ("deepseek-ai-DeepSeek-V3.1", "vllm-tool_chat_template_gemma4"),
        (set(CASES) - THOUGHTLESS, "earlier thoughts go; or there is none unless switched on"),
    ),
    **dict.fromkeys(
        ("Qwen3.5-4B", "hfjs-zai-org-GLM-5.1"), (FORGETS | {"answer", "end"}, "it opens a thought, and earlier ones go, tags and all")
    ),
    **dict.fromkeys(
        ("GLM-4.7-Flash", "MiniMax-M2"),
        (FORGETS | THOUGHTLESS, "it opens a thought, and earlier ones go, as do those without words, tags and all"),
    ),
    **dict.fromkeys(
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "google-gemma-4-31B-it"),
        (set(CASES) - {"end"}, "it opens a thought, or an empty one, and shows none earlier"),
    ),
    **dict.fromkeys(
        ("deepseek-ai-DeepSeek-V3.2", "google-gemma-4-31B-it-interleaved", "Qwen-QwQ-32B"),
        (set(CASES), "it opens an empty thought, and shows none earlier"),
    ),
}
# Whether these show an earlier thought depends on the request's switch as well.
SWITCHED = {"deepseek-ai-DeepSeek-V3.2": "thoughts since the newest question show only where thinking is on"}


@cache
def tokenizer(name: str) -> Any:
    folder = DATA / "tokenizers" / name
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {key: token if isinstance(token, str) else token["content"] for key in ("bos_token", "eos_token") if (token := settings[key])}
    with TemporaryDirectory() as unpacked:
        file = Path(unpacked) / "tokenizer.json"
        file.write_bytes(lzma.decompress((folder / "tokenizer.json.xz").read_bytes()))
        return PreTrainedTokenizerFast(tokenizer_file=str(file), **special)


def renderer(path: Path) -> tuple[PromptRenderer, Family]:
    model_type, name = MODELS[path.parent.name]
    its: Any = copy.copy(tokenizer(name))
    its.chat_template = path.read_text(encoding="utf-8")
    family = detect({"model_type": model_type}, its.chat_template)
    return PromptRenderer(its, family), family


def written(path: Path, *messages: Message, reasoning: Reasoning | None = None) -> str:
    conversation = Conversation(messages, (WEATHER,), reasoning=reasoning or Reasoning())
    return renderer(path)[0].text(conversation).replace("\ufdd0", "")


def reply_in(path: Path, before: tuple[Message, ...], reply: Message, after: tuple[Message, ...]) -> tuple[str, Rendered] | None:
    """What the template makes of a reply, where the second turn begins as the first one does."""
    first, second = written(path, *before), written(path, *before, reply, *after)
    if not second.startswith(first):
        return None
    tokens = [renderer(path)[0].render(Conversation(messages, (WEATHER,))).tokens for messages in (before, (*before, reply, *after))]
    same = len(tokens[0]) - 1  # the last one can join with the reply's first character
    assert tokens[1][:same] == tokens[0][:same], "the same text in the same tokens"
    rest = second[len(first) :]
    ends = CHANNEL_ENDS if renderer(path)[1].channels else ENDS
    end = min((at for mark in ends if (at := rest.find(mark)) >= 0), default=len(rest))
    return rest[:end], renderer(path)[0].render(Conversation(before, (WEATHER,)))


def reads_back(path: Path, before: tuple[Message, ...], reply: Message, after: tuple[Message, ...]) -> bool:
    """Whether a second turn begins with the first and its reply, thoughts and all."""
    found = reply_in(path, before, reply, after)
    if found is None:
        return False
    text, rendered = found
    splitter = splitter_for(renderer(path)[1], tools=(WEATHER,), opened=rendered.opened)
    said, thought, calls = told(splitter.feed(text) + splitter.finish())
    expected = [(call.name, json.loads(call.arguments)) for call in reply.tool_calls]
    return (said.strip(), thought.strip(), calls) == (reply.text, reply.reasoning or "", expected)


@pytest.mark.requirement("ADAPT-01", "ADAPT-08")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_a_second_turn_begins_with_the_first_and_its_reply_reads_back(path: Path) -> None:
    cases = CASES if renderer(path)[1].thinks else THOUGHTLESS
    failing: set[str] = set()
    for name in cases:
        try:
            holds = reads_back(path, *CASES[name])
        except InvalidField:
            holds = False
        failing |= set() if holds else {name}
    expected, reason = BREAKS.get(path.stem, (set[str](), "nothing breaks it"))
    assert failing == expected & set(cases), reason


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_whether_earlier_thoughts_are_shown_is_for_template_and_position_to_say(path: Path) -> None:
    shown: list[tuple[bool, bool, bool]] = []
    for enabled in (None, True, False):
        try:
            within = written(path, ASKED, THOUGHT_AND_CALLED, RESULT, reasoning=Reasoning(enabled=enabled))
            after = written(path, ASKED, THOUGHT_AND_SAID, AGAIN, reasoning=Reasoning(enabled=enabled))
        except InvalidField:
            assert "call" in BREAKS[path.stem][0]
            return
        shown.append(("I need it." in within, "So it is." in after, "22 degrees" in within))
    assert (len(set(shown)) == 1) == (path.stem not in SWITCHED)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_a_whole_conversation_with_tools_renders_in_order(path: Path) -> None:
    conversation = (ASKED, THOUGHT_AND_CALLED, RESULT, THOUGHT_AND_SAID, AGAIN)
    try:
        text = written(path, *conversation)
    except InvalidField:
        assert "call" in BREAKS[path.stem][0]
        return
    leaves_out = BREAKS.get(path.stem, (None, ""))[1] == KNOWS_NO_CALLS
    called = [] if leaves_out else ["get_weather", "Paris", "22 degrees"]
    at = text.rindex("Weather, please?")
    for part in (*called, "It is sunny.", "And tomorrow?"):
        at = text.index(part, at)


# Templates that write arguments as JSON, and break nothing about a call.
SPELLS_JSON = [
    path
    for path in TEMPLATES
    if path.parent.name in ("deepseek", "gptoss", "hermes", "llama", "mistral", "qwen")
    and "call" not in BREAKS.get(path.stem, (set[str](), ""))[0]
    and "<parameter=" not in path.read_text(encoding="utf-8")
]
SPELT = '{"zeta": "é \\"q\\" 東京", "alpha": [1.5, -2, true, null], "n": 12345678901234567890, "empty": {}}'


@pytest.mark.parametrize("path", SPELLS_JSON, ids=lambda p: p.stem)
def test_arguments_in_history_are_spelt_as_the_model_wrote_them(path: Path) -> None:
    called = Message("assistant", "", tool_calls=(ToolCall("abcdefghi", "get_weather", SPELT),))
    assert SPELT in written(path, ASKED, called, RESULT)
