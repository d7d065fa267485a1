"""Tokens of one reply become events: with a real tokenizer and hand-written replies, and once with the engine."""

from collections.abc import AsyncIterator, Iterable
from dataclasses import replace

import pytest

from mlx_manager.core.events import (
    ChoiceFinished,
    Event,
    Finished,
    Reply,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    collect,
)
from mlx_manager.core.messages import Message
from mlx_manager.core.requests import Conversation, GenerationRequest, RawPrompt, Sampling, ToolSpec
from mlx_manager.inference.dialect import Dialect
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.sequence import EndReason, Token
from mlx_manager.inference.local_model import LocalModel
from tests.inference.fixture_models import FAMILIES, attached, dialect, make_engine, within

TOOLS = (ToolSpec("get_weather"),)
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def tokens_of(text: str, *, logprobs: bool = False, family: str = "qwen3") -> list[Token]:
    ids = dialect(family).tokenizer.encode(text, add_special_tokens=False)
    return [Token(0, t, logprob=-float(i), top=((t, -float(i)),)) if logprobs else Token(0, t) for i, t in enumerate(ids)]


async def read(
    text: str | list[Token],
    *,
    reason: EndReason = "stop",
    tools: tuple[ToolSpec, ...] = (),
    stop: tuple[str, ...] = (),
    raw: bool = False,
    parallel: bool = True,
    logprobs: bool = False,
    family: str = "qwen3",
) -> tuple[Reply, list[Event]]:
    """The events of a reply that the model is made to give."""
    prompt = RawPrompt("x") if raw else Conversation((Message("user", "Hi"),), tools)
    request = GenerationRequest("m", (prompt,), stop=stop, parallel_tool_calls=parallel)
    reader = dialect(family).reader(dialect(family).prepare(request), 0)
    tokens = tokens_of(text, logprobs=logprobs, family=family) if isinstance(text, str) else text
    events: list[Event] = []
    for token in tokens:
        if not reader.ended:
            events += reader.read(token)
    events += reader.finish(reason, at_context_end=False)
    return await collect(_each(events)), events


async def _each(events: Iterable[Event]) -> AsyncIterator[Event]:
    for event in events:
        yield event


def finish_of(reply: Reply) -> ChoiceFinished:
    (choice,) = reply.choices
    assert choice.finish is not None
    return choice.finish


# ---- text, thought and calls


@pytest.mark.requirement("ADAPT-07", "SRV-03")
async def test_a_reply_is_split_into_what_is_thought_said_and_called() -> None:
    reply, _ = await read(f"<think>\nHm.\n</think>\n\nLook:\n{CALL}", tools=TOOLS)
    (choice,) = reply.choices
    assert (choice.reasoning, choice.text) == ("Hm.", "Look:")
    assert [(c.name, c.arguments) for c in choice.tool_calls] == [("get_weather", '{"city": "Paris"}')]
    assert finish_of(reply).reason == "tool_calls"


async def test_arguments_come_while_they_are_written_and_join_to_what_the_model_wrote() -> None:
    reply, events = await read(CALL, tools=TOOLS)
    start = next(i for i, event in enumerate(events) if isinstance(event, ToolCallStart))
    deltas = [event for event in events if isinstance(event, ToolCallDelta)]
    assert events[start + 1 : start + 1 + len(deltas)] == deltas, "nothing comes between"
    assert len(deltas) > 3
    assert all(delta.arguments for delta in deltas)
    assert "".join(delta.arguments for delta in deltas) == '{"city": "Paris"}' == reply.choices[0].tool_calls[0].arguments


async def test_a_call_that_is_cut_off_is_still_one_json_object_and_says_so() -> None:
    reply, _ = await read(CALL[: CALL.index("ris")], tools=TOOLS, reason="length")
    assert [c.arguments for c in reply.choices[0].tool_calls] == ['{"city": "Pa"}']
    assert finish_of(reply).reason == "length"


async def test_calls_have_ids_of_their_own() -> None:
    reply, _ = await read(CALL + CALL, tools=TOOLS)
    first, second = reply.choices[0].tool_calls
    assert first.id != second.id


async def test_without_tools_nothing_is_called() -> None:
    reply, _ = await read(CALL)
    assert reply.choices[0].text == CALL
    assert finish_of(reply).reason == "stop"


async def test_a_raw_completion_is_passed_on_with_all_its_markup() -> None:
    text = f"<think>a</think> {CALL}"
    reply, _ = await read(text, raw=True)
    assert (reply.choices[0].text, reply.choices[0].reasoning) == (text, None)


@pytest.mark.parametrize("following", [CALL, " and so on", ""])
async def test_one_call_at_a_time_ends_the_reply_after_the_first(following: str) -> None:
    reply, _ = await read(f"Look: {CALL}{following}", tools=TOOLS, parallel=False)
    assert len(reply.choices[0].tool_calls) == 1
    assert reply.choices[0].text == "Look:"
    assert finish_of(reply).reason == "tool_calls"


async def test_a_reply_that_was_cut_says_so_even_with_calls() -> None:
    reply, _ = await read(CALL, tools=TOOLS, reason="length")
    assert finish_of(reply).reason == "length"


async def test_nothing_said_is_none_not_empty() -> None:
    reply, _ = await read("")
    assert (reply.choices[0].text, reply.choices[0].reasoning) == (None, None)


async def test_text_that_was_kept_back_comes_at_the_end() -> None:
    for text in ("a <", "x < y <tool_c", "a  \n", CALL[:30]):
        reply, _ = await read(text, tools=TOOLS, stop=("<tool_call>!",))
        assert reply.choices[0].text == text


async def test_a_space_before_a_character_that_never_ended_is_not_lost() -> None:
    tokens = tokens_of("word 🦑")
    for length in range(1, len(tokens)):
        reply, _ = await read(tokens[:length], reason="length")
        assert "word ".startswith(reply.choices[0].text or "")
    assert reply.choices[0].text == "word "


async def test_deltas_hold_no_empty_text() -> None:
    _, events = await read(f"<think>a 🎉</think>b 🎉 c {CALL} d", tools=TOOLS, stop=("zzz",))
    assert all(event.text for event in events if isinstance(event, TextDelta))


# ---- stop strings


@pytest.mark.requirement("API-01")
@pytest.mark.parametrize("family", FAMILIES)
async def test_every_stop_string_in_a_text_ends_it_before_and_never_shows(family: str) -> None:
    text = "The quick brown fox, 🎉 42."
    for begin in range(len(text)):
        for end in range(begin + 1, min(begin + 7, len(text)) + 1):
            stop = text[begin:end]
            reply, _ = await read(text, stop=(stop,), family=family)
            assert (reply.choices[0].text or "") == text[: text.find(stop)]
            assert finish_of(reply) == ChoiceFinished("stop_string", 0, stop)


async def test_stop_strings_are_looked_for_in_what_is_said_not_in_what_is_thought_or_called() -> None:
    reply, _ = await read(f"<think>the END of it</think>Yes.\n{CALL}", tools=TOOLS, stop=("END", "Paris"))
    assert (reply.choices[0].reasoning, reply.choices[0].text) == ("the END of it", "Yes.")
    assert finish_of(reply).reason == "tool_calls"


async def test_a_stop_string_does_not_reach_over_a_call() -> None:
    reply, _ = await read(f"EN{CALL}D", tools=TOOLS, stop=("END",))
    assert reply.choices[0].text == "END"
    assert finish_of(reply).stop_string is None


async def test_after_a_stop_string_nothing_is_called() -> None:
    reply, _ = await read(f"Look. END {CALL}", tools=TOOLS, stop=("END",))
    assert reply.choices[0].tool_calls == []
    assert finish_of(reply).reason == "stop_string"


async def test_the_longest_stop_string_that_ends_there_is_named() -> None:
    reply, _ = await read("the END", stop=("ND", "END"))
    assert finish_of(reply).stop_string == "END"


# ---- log probabilities


def spelt(logprobs: Iterable[TokenLogprob]) -> bytes:
    return b"".join(entry.token_bytes for entry in logprobs)


@pytest.mark.parametrize("family", FAMILIES)
async def test_log_probabilities_spell_the_text(family: str) -> None:
    text = "The quick brown fox, 東京 🎉 42."
    reply, events = await read(text, logprobs=True, family=family)
    assert spelt(reply.choices[0].logprobs).decode() == text == reply.choices[0].text
    assert [entry.logprob for entry in reply.choices[0].logprobs] == [-float(i) for i in range(len(tokens_of(text, family=family)))]
    assert all(entry.top[0].token_bytes == entry.token_bytes for entry in reply.choices[0].logprobs)
    for event in events:
        if isinstance(event, TextDelta):
            assert spelt(event.logprobs).decode() == event.text, "each delta has those of its own text"


@pytest.mark.parametrize("family", FAMILIES)
async def test_parts_of_characters_have_their_bytes(family: str) -> None:
    reply, _ = await read("🦑", logprobs=True, family=family)
    assert len(reply.choices[0].logprobs) > 1
    assert spelt(reply.choices[0].logprobs) == "🦑".encode()


async def test_log_probabilities_of_thoughts_and_markup_are_not_those_of_the_text() -> None:
    reply, _ = await read(f"<think>\nLong thoughts.\n</think>\n\nYes, here:\n{CALL}\nDone now.", tools=TOOLS, logprobs=True)
    text = reply.choices[0].text or ""
    assert text == "Yes, here:\nDone now."
    assert spelt(reply.choices[0].logprobs).decode().replace("\n", "") == text.replace("\n", "")


async def test_text_that_was_kept_back_keeps_its_log_probabilities() -> None:
    text = "a < b <tool_x> c <tool"
    reply, _ = await read(text, tools=TOOLS, stop=("b <tool_xyz",), logprobs=True)
    assert spelt(reply.choices[0].logprobs).decode() == text == reply.choices[0].text


async def test_a_stop_string_within_a_token_leaves_the_log_probability_of_what_is_shown() -> None:
    text = "The weather in Paris is fine"
    words = [
        dialect("qwen3").tokenizer.decode([t.token], skip_special_tokens=False, clean_up_tokenization_spaces=False) for t in tokens_of(text)
    ]
    long = max(words, key=len)
    stop = long[len(long) // 2 :]
    reply, _ = await read(text, stop=(stop,), logprobs=True)
    shown = reply.choices[0].text or ""
    assert shown == text[: text.find(stop)]
    begun, at = 0, 0
    for word in words:
        begun += at < len(shown)
        at += len(word)
    assert len(reply.choices[0].logprobs) == begun


# ---- through the engine


async def generate(device: Device, its: Dialect, request: GenerationRequest) -> tuple[Reply, list[Event]]:
    prepared = its.prepare(request)
    async with attached(device, make_engine(device, "qwen3")) as engine:

        async def events() -> AsyncIterator[Event]:
            yield Started(prepared.prompt_tokens)
            async for event in LocalModel(its, engine).generate(prepared):
                seen.append(event)
                yield event

        seen: list[Event] = []
        reply = await within(collect(events(), len(prepared.specs)))
        assert await device.run(lambda: not engine.has_work)
    assert isinstance(seen[-1], Finished)
    assert sum(isinstance(event, Finished) for event in seen) == 1
    assert sum(isinstance(event, ChoiceFinished) for event in seen) == len(prepared.specs)
    return reply, seen


def endless(family: str = "qwen3") -> Dialect:
    """Nothing but a limit ends it."""
    return replace(dialect(family), stop_tokens=frozenset())


@pytest.mark.requirement("API-01", "SRV-03")
@pytest.mark.parametrize("limit", [1, 2, 7])
async def test_usage_counts_prompt_and_reply(device: Device, limit: int) -> None:
    request = GenerationRequest("m", (RawPrompt((310, 320, 330)), RawPrompt((300,))), max_tokens=limit, num_replies=2)
    reply, _ = await generate(device, endless(), request)
    assert (reply.usage.prompt, reply.usage.completion) == (4, 4 * limit)
    assert {choice.finish and choice.finish.reason for choice in reply.choices} == {"length"}


async def test_a_reply_that_fills_the_context_says_so(device: Device) -> None:
    its = replace(endless(), context_length=10)
    reply, _ = await generate(device, its, GenerationRequest("m", (RawPrompt((310, 320, 330)),), max_tokens=100))
    assert finish_of(reply).reason == "context_full"
    assert reply.usage.completion == 7
    reply, _ = await generate(device, its, GenerationRequest("m", (RawPrompt((310, 320, 330)),), max_tokens=6))
    assert finish_of(reply).reason == "length"


@pytest.mark.requirement("API-02")
async def test_replies_to_several_prompts_come_under_their_numbers(device: Device) -> None:
    prompts = (RawPrompt((310, 320, 330)), RawPrompt((300, 301)), RawPrompt((333,)))
    sampling = Sampling(seed=4, temperature=2.0)
    together, _ = await generate(device, endless(), GenerationRequest("m", prompts, sampling, max_tokens=8, num_replies=2))
    assert len({choice.text for choice in together.choices}) > 3
    for i, prompt in enumerate(prompts):
        alone, _ = await generate(device, endless(), GenerationRequest("m", (prompt,), sampling, max_tokens=8, num_replies=2))
        assert [c.text for c in alone.choices] == [c.text for c in together.choices[2 * i : 2 * i + 2]]


async def test_a_stop_string_ends_one_choice_and_not_the_others(device: Device) -> None:
    request = GenerationRequest("m", (RawPrompt((310, 320, 330)), RawPrompt((300, 301))), Sampling(seed=3, temperature=2.0), max_tokens=40)
    whole, _ = await generate(device, endless(), request)
    first, second = (choice.text or "" for choice in whole.choices)
    stop = next(first[i : i + 3] for i in range(4, len(first)) if first[i : i + 3] not in second)
    reply, _ = await generate(device, endless(), replace(request, stop=(stop,)))
    assert [c.text or "" for c in reply.choices] == [first[: first.find(stop)], second]
    assert [c.finish and c.finish.reason for c in reply.choices] == ["stop_string", "length"]


async def test_stream_and_whole_reply_are_the_same_events(device: Device) -> None:
    request = GenerationRequest("m", (RawPrompt((310, 320, 330)),), Sampling(temperature=0), max_tokens=20, num_top_logprobs=2)
    reply, events = await generate(device, endless(), request)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == reply.choices[0].text
    assert {len(entry.top) for entry in reply.choices[0].logprobs} == {2}
    assert any(isinstance(e, Finished) and e.timing is not None and e.timing.first_token is not None for e in events)


async def test_a_reader_who_leaves_frees_the_engine(device: Device) -> None:
    its = endless()
    prepared = its.prepare(GenerationRequest("m", (RawPrompt((310,)),), max_tokens=4000, num_replies=2))
    async with attached(device, make_engine(device, "qwen3")) as engine:
        stream = LocalModel(its, engine).generate(prepared)
        assert await within(anext(stream))
        await stream.aclose()
        decoded = engine.counters.decoded_tokens
        assert await device.run(lambda: engine.num_running + engine.num_waiting) == 0
        assert engine.counters.decoded_tokens < decoded + 20
