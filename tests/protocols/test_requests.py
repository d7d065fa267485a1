"""What an OpenAI client sends → what it wants: absent is not zero, and nothing but `InvalidField` comes of nonsense."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import ToolCall
from mlx_manager.core.requests import Conversation, GenerationRequest, RawPrompt
from mlx_manager.protocols.openai.requests import read_chat, read_completion
from mlx_manager.protocols.openai.schema import CHAT_FIELDS, COMPLETION_FIELDS

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Hello"}


def chat(**fields: Any) -> GenerationRequest:
    return read_chat(json.dumps(CHAT | fields).encode()).request


def conversation(**fields: Any) -> Conversation:
    (prompt,) = chat(**fields).prompts
    assert isinstance(prompt, Conversation)
    return prompt


SAMPLING = ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed"]


@pytest.mark.parametrize("name", SAMPLING)
def test_zero_is_an_answer_and_null_is_none(name: str) -> None:
    for read, base in ((read_chat, CHAT), (read_completion, COMPLETION)):
        assert getattr(read(json.dumps(base | {name: 0}).encode()).request.sampling, name) == 0
        assert getattr(read(json.dumps(base | {name: None}).encode()).request.sampling, name) is None
        assert getattr(read(json.dumps(base).encode()).request.sampling, name) is None


def test_empty_values_are_answers_too() -> None:
    assert conversation(messages=[{"role": "user", "content": ""}]).messages[0].content == ""
    assert conversation(messages=[{"role": "user", "content": []}]).messages[0].content == ""
    assert chat(stop=[]).stop == ()
    assert conversation(tools=[]).tools == ()
    assert chat(logit_bias={}).sampling.logit_bias == {}
    assert chat(logprobs=False).num_top_logprobs is None
    assert chat(logprobs=True).num_top_logprobs == chat(logprobs=True, top_logprobs=0).num_top_logprobs == 0
    assert not chat(parallel_tool_calls=False).parallel_tool_calls
    assert conversation(enable_thinking=False).template_options == {"enable_thinking": False}
    assert conversation().template_options == {}
    reasoned = {"role": "assistant", "content": None, "reasoning_content": "", "reasoning": "other"}
    assert conversation(messages=[reasoned]).messages[0].reasoning == ""
    assert read_completion(b'{"model": "m", "prompt": "", "logprobs": 0}').request.num_top_logprobs == 0


def test_an_empty_stop_list_and_either_name_of_the_limit_are_read() -> None:
    assert chat().max_tokens is None
    assert (
        chat(max_tokens=5).max_tokens
        == chat(max_completion_tokens=5).max_tokens
        == chat(max_tokens=5, max_completion_tokens=5).max_tokens
        == 5
    )
    assert chat(stop="a").stop == chat(stop=["a"]).stop == ("a",)


def test_history_keeps_its_order_and_its_calls_as_they_were_written() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1.0, "a": "é"}'}}
    messages = conversation(
        messages=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "21"},
            {"role": "system", "content": "In between."},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        ]
    ).messages
    assert [m.role for m in messages] == ["system", "user", "assistant", "tool", "system", "assistant"]
    assert [m.content for m in messages] == ["Be kind.", "one, two", "", "21", "In between.", "No."]
    assert messages[2].tool_calls == (ToolCall("call_1", "f", '{"b": 1.0, "a": "é"}'),)
    assert messages[3].tool_call_id == "call_1"


def test_prompts_of_every_kind_are_read() -> None:
    def prompts(prompt: Any) -> tuple[RawPrompt, ...]:
        return read_completion(json.dumps({"model": "m", "prompt": prompt}).encode()).request.prompts  # type: ignore[return-value]

    assert prompts("a") == (RawPrompt("a"),)
    assert prompts(["a", "b"]) == (RawPrompt("a"), RawPrompt("b"))
    assert prompts([1, 2]) == (RawPrompt((1, 2)),)
    assert prompts([[1], [2, 3]]) == (RawPrompt((1,)), RawPrompt((2, 3)))


numbers = st.integers() | st.floats(allow_nan=True) | st.sampled_from([0, 1, -1, 2**63, 10**400, 1e308])
leaves = st.none() | st.booleans() | numbers | st.text() | st.sampled_from(["user", "text", "auto", "function", "m", ""])
KEYS = sorted(
    {*CHAT_FIELDS, *COMPLETION_FIELDS, "role", "content", "type", "text", "function", "name", "tool_calls", "id", "arguments", "$ref"}
)
values = st.recursive(
    leaves, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(), v, max_size=4), max_leaves=12
)
messages = st.lists(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("role", "content", "tool_calls", "name", "tool_call_id"), values)), max_size=3
)


def bodies(base: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A good body with some fields replaced by anything."""
    changes = st.dictionaries(st.sampled_from(KEYS) | st.text(), values, max_size=3) | st.fixed_dictionaries({"messages": messages})
    return changes.map(lambda wrong: base | wrong)


@given(bodies(CHAT) | bodies(COMPLETION))
def test_any_object_is_read_or_refused_as_an_invalid_field(body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    for read in (read_chat, read_completion):
        with suppress(InvalidField):
            read(raw)


@given(st.binary())
def test_any_bytes_are_read_or_refused_as_an_invalid_field(raw: bytes) -> None:
    with pytest.raises(InvalidField):
        read_chat(raw)
