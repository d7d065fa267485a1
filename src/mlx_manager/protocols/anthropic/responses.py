"""What happened → what an Anthropic client reads, whole and in a stream."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from mlx_manager.core.events import (
    ChoiceFinished,
    Event,
    Finished,
    FinishReason,
    ReasoningDelta,
    Reply,
    Started,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)
from mlx_manager.protocols.anthropic.errors import error_type
from mlx_manager.protocols.seal import Seal
from mlx_manager.protocols.wire import Failure, Frame, Json

_STOP_REASONS: Mapping[FinishReason, str] = MappingProxyType(
    {
        "stop": "end_turn",
        "stop_string": "stop_sequence",
        "length": "max_tokens",
        "context_full": "model_context_window_exceeded",
        "tool_calls": "tool_use",
    }
)


@dataclass(slots=True)
class MessagesWriter:
    """`model` is the name that the client sent. With `omits_thinking` the text of a thinking block is sealed in its signature.

    Holds which block of the stream is open, what was thought in it, and how the reply ended. Blocks are written one at a time:
    what is said after a call is a block of its own here, while a whole message has one text."""

    id: str
    model: str
    seal: Seal
    omits_thinking: bool = False
    _num_blocks: int = 0
    _open: Literal["thinking", "text", "tool_use"] | None = None
    _thoughts: list[str] = field(default_factory=list[str])
    _has_input: bool = False
    _finish: ChoiceFinished | None = None

    def whole(self, reply: Reply) -> Json:
        (choice,) = reply.choices
        content: list[Json] = []
        if choice.reasoning:
            thinking = "" if self.omits_thinking else choice.reasoning
            content.append({"type": "thinking", "thinking": thinking, "signature": self._signature(choice.reasoning)})
        if choice.text:
            content.append({"type": "text", "text": choice.text})
        content += [
            {"type": "tool_use", "id": _tool_id(call.id), "name": call.name, "input": json.loads(call.arguments or "{}")}
            for call in choice.tool_calls
        ]
        assert choice.finish is not None, "a stream that ended has finished every choice"
        return self._message(content, usage(reply.usage), choice.finish)

    def frames(self, event: Event) -> list[Frame]:
        match event:
            case Started(prompt_tokens):
                # How much of the prompt was there already is known at the end, and overwrites this.
                message = self._message([], usage(Usage(prompt=prompt_tokens)), None)
                return [_frame("message_start", message=message), self.keep_alive()]
            case ReasoningDelta(text):
                return self._think(text) if text else []
            case TextDelta(text):
                return [*self._enter("text", {"type": "text", "text": ""}), self._delta("text_delta", text=text)] if text else []
            case ToolCallStart(_, call_id, name):
                block: Json = {"type": "tool_use", "id": _tool_id(call_id), "name": name, "input": {}}
                return [*self._close(), *self._enter("tool_use", block)]
            case ToolCallDelta(_, arguments):
                assert self._open == "tool_use", "a call's arguments follow its start"
                self._has_input = self._has_input or bool(arguments)
                return [self._delta("input_json_delta", partial_json=arguments)] if arguments else []
            case ChoiceFinished():
                self._finish = event
                return self._close()
            case Finished(used):
                counts = usage(used)
                del counts["cache_creation"], counts["service_tier"]  # no part of this event
                return [_frame("message_delta", delta=_ending(self._finish), usage=counts), _frame("message_stop")]

    def failed(self, failure: Failure) -> list[Frame]:
        return [_frame("error", error={"type": error_type(failure.status), "message": failure.message})]

    def keep_alive(self) -> Frame:
        return _frame("ping")

    def _think(self, text: str) -> list[Frame]:
        frames = self._enter("thinking", {"type": "thinking", "thinking": "", "signature": ""})
        self._thoughts.append(text)
        return frames if self.omits_thinking else [*frames, self._delta("thinking_delta", thinking=text)]

    def _enter(self, kind: Literal["thinking", "text", "tool_use"], block: Json) -> list[Frame]:
        """What it takes to be in such a block: nothing, in the one that is open."""
        if self._open == kind:
            return []
        frames = self._close()
        self._open, self._has_input = kind, False
        return [*frames, _frame("content_block_start", index=self._num_blocks, content_block=block)]

    def _close(self) -> list[Frame]:
        """The end of the block that is open, if one is."""
        if self._open is None:
            return []
        frames: list[Frame] = []
        if self._open == "thinking":
            frames.append(self._delta("signature_delta", signature=self._signature("".join(self._thoughts))))
            self._thoughts.clear()
        elif self._open == "tool_use" and not self._has_input:
            frames.append(self._delta("input_json_delta", partial_json="{}"))
        frames.append(_frame("content_block_stop", index=self._num_blocks))
        self._open, self._num_blocks = None, self._num_blocks + 1
        return frames

    def _delta(self, kind: str, **piece: str) -> Frame:
        return _frame("content_block_delta", index=self._num_blocks, delta={"type": kind, **piece})

    def _signature(self, thought: str) -> str:
        return self.seal.seal(thought) if self.omits_thinking else self.seal.sign(thought)

    def _message(self, content: list[Json], used: Json, finish: ChoiceFinished | None) -> Json:
        head: Json = {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content}
        return {**head, **_ending(finish), "stop_details": None, "usage": used}


def usage(used: Usage) -> Json:
    return {
        "input_tokens": used.prompt - used.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": used.cached,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "output_tokens": used.completion,
        "output_tokens_details": {"thinking_tokens": used.reasoning},
        "service_tier": "standard",
    }


def _ending(finish: ChoiceFinished | None) -> Json:
    if finish is None:
        return {"stop_reason": None, "stop_sequence": None}
    return {"stop_reason": _STOP_REASONS[finish.reason], "stop_sequence": finish.stop_string}


def _frame(kind: str, **fields: object) -> Frame:
    """Clients drop an event without a name, or with another name than its type."""
    return Frame({"type": kind, **fields}, event=kind)


def _tool_id(call_id: str) -> str:
    """The same call under the name that clients of this protocol expect."""
    return f"toolu_{call_id.removeprefix('call_')}"
