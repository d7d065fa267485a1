"""What happened → what an OpenAI client reads. One writer for each endpoint; each writes whole replies and chunks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_manager.core.events import (
    Choice,
    ChoiceFinished,
    CollectedCall,
    Event,
    Finished,
    FinishReason,
    ReasoningDelta,
    Reply,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)
from mlx_manager.protocols.custom_tools import read_input
from mlx_manager.protocols.wire import DONE, KEEP_ALIVE, Failure, Frame, Json

_FINISH: dict[FinishReason, str] = {
    "stop": "stop",
    "stop_string": "stop",
    "length": "length",
    "context_full": "length",
    "tool_calls": "tool_calls",
}


@dataclass(frozen=True, slots=True)
class ChatWriter:
    """`model` is the name that the client sent; `created` in Unix seconds. `custom_tools` take a text; no stream has calls of them."""

    id: str
    model: str
    created: int
    fingerprint: str
    num_choices: int
    include_usage: bool = False
    custom_tools: frozenset[str] = frozenset()

    def whole(self, reply: Reply) -> Json:
        choices = [
            {
                "index": i,
                "message": _message(choice, self.custom_tools),
                "logprobs": _logprobs(choice.logprobs) if choice.logprobs else None,
                "finish_reason": _finish(choice),
            }
            for i, choice in enumerate(reply.choices)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage(reply.usage)}

    def frames(self, event: Event) -> list[Frame]:
        return _frames(self._chunks(event), event)

    def failed(self, failure: Failure) -> list[Frame]:
        return [_error(failure)]

    def keep_alive(self) -> Frame:
        return KEEP_ALIVE

    def _chunks(self, event: Event) -> list[Json]:
        match event:
            case Started():
                return [self._chunk(i, {"role": "assistant", "content": "", "refusal": None}) for i in range(self.num_choices)]
            case TextDelta(text, choice, logprobs):
                return [self._chunk(choice, {"content": text}, logprobs=_logprobs(logprobs) if logprobs else None)]
            case ReasoningDelta(text, choice):
                return [self._chunk(choice, {"reasoning_content": text})]
            case ToolCallStart(index, call_id, name, choice):
                call = {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
                return [self._chunk(choice, {"tool_calls": [call]})]
            case ToolCallDelta(index, arguments, choice):
                return [self._chunk(choice, {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]})]
            case ChoiceFinished(reason, choice):
                return [self._chunk(choice, {}, finish_reason=_FINISH[reason])]
            case Finished(used):
                if not self.include_usage:
                    return []
                return [{**self._head("chat.completion.chunk"), "choices": [], "usage": usage(used)}]

    def _head(self, kind: str) -> Json:
        head: Json = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": self.fingerprint, "service_tier": "default"}

    def _chunk(self, choice: int, delta: Json, *, finish_reason: str | None = None, logprobs: Json | None = None) -> Json:
        chunk = self._head("chat.completion.chunk")
        chunk["choices"] = [{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]
        if self.include_usage:
            chunk["usage"] = None
        return chunk


@dataclass(slots=True)
class CompletionWriter:
    """`echo` has the text of each prompt if it is to stand before the reply. Holds the text offsets of each choice."""

    id: str
    model: str
    created: int
    fingerprint: str
    num_replies: int
    echo: Sequence[str] = ()
    include_usage: bool = False
    _offsets: dict[int, int] = field(default_factory=dict[int, int])

    def whole(self, reply: Reply) -> Json:
        choices = [
            {
                "text": self._echoed(i) + (choice.text or ""),
                "index": i,
                "finish_reason": _finish(choice),
                "logprobs": _completion_logprobs(choice.logprobs, 0) if choice.logprobs else None,
            }
            for i, choice in enumerate(reply.choices)
        ]
        return {**self._head(), "choices": choices, "usage": usage(reply.usage)}

    def frames(self, event: Event) -> list[Frame]:
        return _frames(self._chunks(event), event)

    def failed(self, failure: Failure) -> list[Frame]:
        return [_error(failure)]

    def keep_alive(self) -> Frame:
        return KEEP_ALIVE

    def _chunks(self, event: Event) -> list[Json]:
        match event:
            case Started():
                num_choices = self.num_replies * len(self.echo)
                return [self._chunk(i, self._echoed(i)) for i in range(num_choices)]
            case TextDelta(text, choice, logprobs):
                offset = self._offsets.get(choice, 0)
                self._offsets[choice] = offset + len(text)
                return [self._chunk(choice, text, logprobs=_completion_logprobs(logprobs, offset) if logprobs else None)]
            case ChoiceFinished(reason, choice):
                return [self._chunk(choice, "", finish_reason=_FINISH[reason])]
            case Finished(used):
                return [{**self._head(), "choices": [], "usage": usage(used)}] if self.include_usage else []
            case ReasoningDelta() | ToolCallStart() | ToolCallDelta():
                raise AssertionError("a raw prompt is answered with raw text")

    def _echoed(self, choice: int) -> str:
        return self.echo[choice // self.num_replies] if self.echo else ""

    def _head(self) -> Json:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _chunk(self, choice: int, text: str, *, finish_reason: str | None = None, logprobs: Json | None = None) -> Json:
        chunk = self._head()
        chunk["choices"] = [{"text": text, "index": choice, "finish_reason": finish_reason, "logprobs": logprobs}]
        if self.include_usage:
            chunk["usage"] = None
        return chunk


def _frames(chunks: list[Json], event: Event) -> list[Frame]:
    """A stream opens with something and ends with a word of its own."""
    frames = [Frame(chunk) for chunk in chunks]
    match event:
        case Started():
            return frames or [KEEP_ALIVE]
        case Finished():
            return [*frames, DONE]
        case _:
            return frames


def _error(failure: Failure) -> Frame:
    return Frame({"error": {"message": failure.message, "type": failure.type_, "param": failure.param, "code": failure.code}})


def usage(used: Usage) -> Json:
    return {
        "prompt_tokens": used.prompt,
        "completion_tokens": used.completion,
        "total_tokens": used.prompt + used.completion,
        "prompt_tokens_details": {"cached_tokens": used.cached, "cache_write_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": used.reasoning},
    }


def _call(call: CollectedCall, *, is_custom: bool) -> Json:
    if is_custom:
        return {"id": call.id, "type": "custom", "custom": {"name": call.name, "input": read_input(call.arguments)}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _message(choice: Choice, custom_tools: frozenset[str]) -> Json:
    message: Json = {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []}
    if choice.reasoning is not None:
        message["reasoning_content"] = choice.reasoning
    if choice.tool_calls:
        message["tool_calls"] = [_call(call, is_custom=call.name in custom_tools) for call in choice.tool_calls]
    elif choice.text is None:
        message["content"] = ""
    return message


def _finish(choice: Choice) -> str:
    assert choice.finish is not None, "a stream that ended has finished every choice"
    return _FINISH[choice.finish.reason]


def _number(logprob: float) -> float:
    """JSON has no infinity; upstream writes this for what cannot happen."""
    return max(logprob, -9999.0)


def _logprobs(tokens: Sequence[TokenLogprob]) -> Json:
    def one(t: TokenLogprob) -> Json:
        return {"token": t.token, "logprob": _number(t.logprob), "bytes": list(t.token_bytes)}

    return {"content": [{**one(t), "top_logprobs": [one(alternative) for alternative in t.top]} for t in tokens], "refusal": None}


def _completion_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> Json:
    offsets: list[int] = []
    for t in tokens:
        offsets.append(offset)
        offset += len(t.token)
    return {
        "tokens": [t.token for t in tokens],
        "token_logprobs": [_number(t.logprob) for t in tokens],
        "top_logprobs": [{alternative.token: _number(alternative.logprob) for alternative in t.top} for t in tokens],
        "text_offset": offsets,
    }
