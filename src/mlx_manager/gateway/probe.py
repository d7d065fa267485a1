"""What a model can do, found out by asking it: for a tool call, for a thought, for the colour of a picture."""

import io
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace

from PIL import Image as Pillow

from mlx_manager.core.capabilities import CAPABILITIES, Capability
from mlx_manager.core.errors import ContextTooLong, InvalidField
from mlx_manager.core.events import Choice, Event, collect
from mlx_manager.core.messages import Content, Image, Message
from mlx_manager.core.requests import Conversation, GenerationRequest, Reasoning, Sampling, ToolSpec

Stream = Callable[[GenerationRequest], AsyncGenerator[Event]]

# Enough for a model that thinks first although it was asked not to.
_MAX_TOKENS = 512
_THOUGHT_TOKENS = 64
_SIDE = 56
_COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220)}
_SHOWN_CHARS = 80
_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "The city name"}}, "required": ["city"]}
_SUM = "What is 2 + 3?"
_NO_THOUGHT = Reasoning(enabled=False)
_WEATHER = ToolSpec("get_weather", "Get the current weather", _PARAMETERS)


@dataclass(frozen=True, slots=True)
class Answer:
    """`detail` says what was seen, in one line."""

    verified: bool
    detail: str


async def probe(stream: Stream, asking: GenerationRequest) -> Mapping[Capability, Answer]:
    """Each capability, asked for; `asking` says of whom, and how urgently. Raises `core.errors` where the model could not be asked at all,
    such as `ModelLoadFailed`."""
    ways: Mapping[Capability, Callable[[Stream, GenerationRequest], Awaitable[Answer]]]
    ways = {"tools": _calls, "thinking": _thinks, "thinking_switch": _switches, "vision": _sees}
    answers: dict[Capability, Answer] = {}
    for capability in CAPABILITIES:
        try:
            answers[capability] = await ways[capability](stream, asking)
        except (InvalidField, ContextTooLong) as error:  # the template or the model does not take what was sent
            answers[capability] = Answer(False, error.message)
    return answers


async def _calls(stream: Stream, asking: GenerationRequest) -> Answer:
    """Of its own accord: a call that is required would be written by any model."""
    choice = await _ask(stream, asking, "What is the weather in Paris?", tools=(_WEATHER,))
    for call in choice.tool_calls:
        if call.name == _WEATHER.name and isinstance(arguments := _object(call.arguments), dict) and "city" in arguments:
            return Answer(True, f"it called {call.name} with {_short(call.arguments)}")
    if choice.tool_calls:
        return Answer(False, f"its call was not the one that was offered: {_short(choice.tool_calls[0].name)}")
    return Answer(False, f"it called no tool, and said: {_short(choice.text)}")


async def _thinks(stream: Stream, asking: GenerationRequest) -> Answer:
    choice = await _ask(stream, asking, _SUM, reasoning=Reasoning(enabled=True, budget=_THOUGHT_TOKENS))
    if choice.reasoning is not None and choice.reasoning.strip():
        return Answer(True, f"it thought: {_short(choice.reasoning)}")
    return Answer(False, f"it did not think, and said: {_short(choice.text)}")


async def _switches(stream: Stream, asking: GenerationRequest) -> Answer:
    """Told to think it does, and told not to it answers at once."""
    told = await _thinks(stream, asking)
    if not told.verified:
        return told
    choice = await _ask(stream, asking, _SUM)
    if choice.reasoning is not None and choice.reasoning.strip():
        return Answer(False, f"told not to, it thought: {_short(choice.reasoning)}")
    return Answer(bool(choice.text), f"told not to think, it said: {_short(choice.text)}")


async def _sees(stream: Stream, asking: GenerationRequest) -> Answer:
    """Two pictures, so that a guess is not taken for sight."""
    for name in _COLOURS:
        choice = await _ask(stream, asking, (_picture(name), "What color is this image?"))
        if name not in (choice.text or "").lower():
            return Answer(False, f"of a {name} picture it said: {_short(choice.text)}")
    return Answer(True, f"it told {' from '.join(_COLOURS)}")


async def _ask(
    stream: Stream, asking: GenerationRequest, content: Content, *, tools: tuple[ToolSpec, ...] = (), reasoning: Reasoning = _NO_THOUGHT
) -> Choice:
    prompt = Conversation((Message("user", content),), tools=tools, reasoning=reasoning)
    request = replace(asking, prompts=(prompt,), sampling=Sampling(temperature=0.0), max_tokens=_MAX_TOKENS)
    async with aclosing(stream(request)) as events:
        (choice,) = (await collect(events)).choices
    return choice


def _picture(colour: str) -> Image:
    file = io.BytesIO()
    Pillow.new("RGB", (_SIDE, _SIDE), _COLOURS[colour]).save(file, "PNG")
    return Image(file.getvalue())


def _object(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _short(text: str | None) -> str:
    line = " ".join((text or "").split())
    return repr(line if len(line) <= _SHOWN_CHARS else f"{line[:_SHOWN_CHARS]}…")
