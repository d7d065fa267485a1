"""What happens while a reply is made. Every stream is `Started`, any number of deltas, a `ChoiceFinished` for each choice,
and exactly one `Finished`; or it ends in an exception of `core.errors`. Silence is never an end."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from mlx_manager.core.requests import ReasoningOption

FinishReason = Literal["stop", "stop_string", "length", "context_full", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one token under the model's own distribution (before temperature and filters).
    `top` holds the likeliest tokens, best first."""

    token: str
    token_bytes: bytes
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The request is understood and fits; slow work begins. `prompt_tokens` counts all its prompts; `unused` says
    what of `requests.Reasoning` this model has no use for."""

    prompt_tokens: int
    unused: tuple[ReasoningOption, ...] = ()


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """`index` numbers the calls of one choice from 0."""

    index: int
    id: str
    name: str
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """The next piece of a call's arguments; the pieces join to one JSON object."""

    index: int
    arguments: str
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """`stop_string` is the one that matched, when that was the reason."""

    reason: FinishReason
    choice: int = 0
    stop_string: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens. `cached` are those of the prompt whose keys and values were already there; `reasoning` is part of `completion`."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """When the first sequence of a request got through each stage: seconds of `time.monotonic()`; None where it never did."""

    submitted: float
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    usage: Usage
    timing: Timing | None = None


Event = Started | TextDelta | ReasoningDelta | ToolCallStart | ToolCallDelta | ChoiceFinished | Finished


@dataclass(slots=True)
class CollectedCall:
    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Run:
    """Neighbouring deltas of one kind as one."""

    kind: Literal["text", "reasoning"]
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])


@dataclass(slots=True)
class Choice:
    """One whole reply, as `collect` puts it together. `None` text means that nothing was said, not that "" was.
    `parts` is the same in the order in which it was told."""

    text: str | None = None
    reasoning: str | None = None
    tool_calls: list[CollectedCall] = field(default_factory=list[CollectedCall])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    finish: ChoiceFinished | None = None
    parts: list[Run | CollectedCall] = field(default_factory=list[Run | CollectedCall])

    def run(self, kind: Literal["text", "reasoning"]) -> Run:
        """The part that goes on, or a new one after another kind."""
        match self.parts[-1] if self.parts else None:
            case Run(last) as run if last == kind:
                return run
            case _:
                run = Run(kind)
                self.parts.append(run)
                return run


@dataclass(slots=True)
class Reply:
    choices: list[Choice]
    usage: Usage
    unused: tuple[ReasoningOption, ...] = ()


async def collect(events: AsyncIterator[Event], num_choices: int = 1) -> Reply:
    """The whole reply that a stream tells piece by piece."""
    reply = Reply([Choice() for _ in range(num_choices)], Usage())
    async for event in events:
        match event:
            case Started(_, unused):
                reply.unused = unused
            case TextDelta(text, choice, logprobs):
                target = reply.choices[choice]
                target.text = (target.text or "") + text
                target.logprobs.extend(logprobs)
                if text or logprobs:
                    run = target.run("text")
                    run.text += text
                    run.logprobs.extend(logprobs)
            case ReasoningDelta(text, choice):
                target = reply.choices[choice]
                target.reasoning = (target.reasoning or "") + text
                if text:
                    target.run("reasoning").text += text
            case ToolCallStart(_, call_id, name, choice):
                target, call = reply.choices[choice], CollectedCall(call_id, name)
                target.tool_calls.append(call)
                target.parts.append(call)
            case ToolCallDelta(index, arguments, choice):
                reply.choices[choice].tool_calls[index].arguments += arguments
            case ChoiceFinished(_, choice):
                reply.choices[choice].finish = event
            case Finished(usage):
                reply.usage = usage
    return reply
