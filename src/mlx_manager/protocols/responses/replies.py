"""What happened → what a client of the Responses API reads: a whole response, or the events that tell of it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlx_manager.core.events import (
    Choice,
    ChoiceFinished,
    CollectedCall,
    Event,
    Finished,
    ReasoningDelta,
    Reply,
    Run,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)
from mlx_manager.protocols.custom_tools import InputReader
from mlx_manager.protocols.responses.requests import CalledTool
from mlx_manager.protocols.wire import Failure, Frame, Json

Stage = Literal["in_progress", "completed", "incomplete"]
# What is told of an item: the type of an event and its fields.
Told = tuple[str, Json]
NewId = Callable[[str], str]


# ---- items of the output, while they are being made: told when they begin, piece by piece, and when they end


@dataclass(slots=True)
class _Message:
    id: str
    index: int
    text: str = ""
    logprobs: list[Json] = field(default_factory=list[Json])

    def begun(self) -> list[Told]:
        item: Json = {**self.json("in_progress"), "content": []}
        return [_item_added(self.index, item), ("response.content_part.added", {**self._where(), "part": self._part()})]

    def add(self, text: str, logprobs: Sequence[TokenLogprob]) -> list[Told]:
        written = [_logprob(token) for token in logprobs]
        self.text += text
        self.logprobs += written
        return [("response.output_text.delta", {**self._where(), "delta": text, "logprobs": written})]

    def ended(self, stage: Stage) -> list[Told]:
        return [
            ("response.output_text.done", {**self._where(), "text": self.text, "logprobs": self.logprobs}),
            ("response.content_part.done", {**self._where(), "part": self._part()}),
            _item_done(self.index, self.json(stage)),
        ]

    def stage(self, *, was_cut: bool) -> Stage:
        return "incomplete" if was_cut else "completed"

    def json(self, stage: Stage) -> Json:
        return {"id": self.id, "type": "message", "role": "assistant", "status": stage, "content": [self._part()]}

    def _part(self) -> Json:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self.logprobs)}

    def _where(self) -> Json:
        return {"item_id": self.id, "output_index": self.index, "content_index": 0}


@dataclass(slots=True)
class _Reasoning:
    """Raw text, or with `summarises` the same text as a summary; and `seal`ed in any case, for it to come back."""

    id: str
    index: int
    summarises: bool
    seal: Callable[[str], str]
    text: str = ""

    def begun(self) -> list[Told]:
        item: Json = {"id": self.id, "type": "reasoning", "summary": [], "content": [], "status": "in_progress"}
        return [_item_added(self.index, item), (f"{self._part_event}.added", {**self._where(), "part": self._part("")})]

    def add(self, text: str) -> list[Told]:
        self.text += text
        return [(f"{self._text_event}.delta", {**self._where(), "delta": text})]

    def ended(self, stage: Stage) -> list[Told]:
        return [
            (f"{self._text_event}.done", {**self._where(), "text": self.text}),
            (f"{self._part_event}.done", {**self._where(), "part": self._part(self.text)}),
            _item_done(self.index, self.json(stage)),
        ]

    def stage(self, *, was_cut: bool) -> Stage:
        return "incomplete" if was_cut else "completed"

    def json(self, stage: Stage) -> Json:
        shown, hidden = ("summary", "content") if self.summarises else ("content", "summary")
        said = {shown: [self._part(self.text)], hidden: list[Json]()}
        sealed = self.seal(self.text)
        return {"id": self.id, "type": "reasoning", **said, "encrypted_content": sealed, "status": stage}

    @property
    def _part_event(self) -> str:
        return "response.reasoning_summary_part" if self.summarises else "response.content_part"

    @property
    def _text_event(self) -> str:
        return "response.reasoning_summary_text" if self.summarises else "response.reasoning_text"

    def _part(self, text: str) -> Json:
        return {"type": "summary_text" if self.summarises else "reasoning_text", "text": text}

    def _where(self) -> Json:
        return {"item_id": self.id, "output_index": self.index, "summary_index" if self.summarises else "content_index": 0}


@dataclass(slots=True)
class _FunctionCall:
    id: str
    index: int
    call_id: str
    tool: CalledTool
    arguments: str = ""

    def begun(self) -> list[Told]:
        return [_item_added(self.index, self.json("in_progress"))]

    def add(self, arguments: str) -> list[Told]:
        self.arguments += arguments
        return [("response.function_call_arguments.delta", {**self._where(), "delta": arguments})]

    def ended(self, stage: Stage) -> list[Told]:
        done = {**self._where(), "name": self.tool.name, "arguments": self.arguments}
        return [("response.function_call_arguments.done", done), _item_done(self.index, self.json(stage))]

    def stage(self, *, was_cut: bool) -> Stage:
        return "incomplete" if was_cut and not _is_json(self.arguments) else "completed"

    def json(self, stage: Stage) -> Json:
        head = {"id": self.id, "type": "function_call", "call_id": self.call_id, **_names(self.tool)}
        return {**head, "arguments": self.arguments, "status": stage}

    def _where(self) -> Json:
        return {"item_id": self.id, "output_index": self.index}


@dataclass(slots=True)
class _CustomCall:
    """The model wrote JSON; the client reads the text in it."""

    id: str
    index: int
    call_id: str
    tool: CalledTool
    arguments: str = ""
    _reader: InputReader = field(default_factory=InputReader)

    def begun(self) -> list[Told]:
        return [_item_added(self.index, self.json("in_progress"))]

    def add(self, arguments: str) -> list[Told]:
        self.arguments += arguments
        return self._delta(self._reader.feed(arguments))

    def ended(self, stage: Stage) -> list[Told]:
        rest = self._delta(self._reader.finish())
        done = ("response.custom_tool_call_input.done", {**self._where(), "input": self._reader.input})
        return [*rest, done, _item_done(self.index, self.json(stage))]

    def stage(self, *, was_cut: bool) -> Stage:
        return "incomplete" if was_cut and not _is_json(self.arguments) else "completed"

    def json(self, stage: Stage) -> Json:
        head = {"id": self.id, "type": "custom_tool_call", "call_id": self.call_id, **_names(self.tool)}
        return {**head, "input": self._reader.input, "status": stage}

    def _delta(self, text: str) -> list[Told]:
        return [("response.custom_tool_call_input.delta", {**self._where(), "delta": text})] if text else []

    def _where(self) -> Json:
        return {"item_id": self.id, "output_index": self.index}


_Item = _Message | _Reasoning | _FunctionCall | _CustomCall


@dataclass(slots=True)
class ResponsesWriter:
    """Of one response. Holds what has been made of it: the items that are done, the one that is open, the number of the next event.

    `given` are the fields that say what was asked; `tools` are by the names that the model knows; `created_at` and `clock` are in Unix
    seconds. `ended` hears of the response when nothing more is added to it, before its client does.
    """

    id: str
    model: str
    created_at: int
    given: Json
    tools: Mapping[str, CalledTool]
    summarises: bool
    seal: Callable[[str], str]
    new_id: NewId
    clock: Callable[[], float]
    ended: Callable[[Json], None]
    _done: list[Json] = field(default_factory=list[Json])
    _open: _Item | None = None
    _finish: ChoiceFinished | None = None
    _number: int = 0

    def whole(self, reply: Reply) -> Json:
        (choice,) = reply.choices
        for event in _as_events(choice):
            self._told(event)
        return self._final(reply.usage)

    def frames(self, event: Event) -> list[Frame]:
        return [self._frame(told) for told in self._told(event)]

    def failed(self, failure: Failure) -> list[Frame]:
        told: list[Told] = []
        if self._number == 0:
            told.append(("response.created", {"response": self._response("in_progress")}))
        # What is open is nothing that anybody may act on: no event says that it is done.
        output = [*self._done, *([] if self._open is None else [self._open.json("incomplete")])]
        response = self._response("failed", error=_error(failure), output=output)
        self.ended(response)
        told.append(("response.failed", {"response": response}))
        return [self._frame(one) for one in told]

    def keep_alive(self) -> Frame:
        """An event, not a comment: there are clients that count events only."""
        return self._frame(("response.in_progress", {"response": self._response("in_progress")}))

    def _frame(self, told: Told) -> Frame:
        kind, fields = told
        number, self._number = self._number, self._number + 1
        return Frame({"type": kind, "sequence_number": number, **fields}, event=kind)

    def _told(self, event: Event) -> list[Told]:
        match event:
            case Started():
                response = self._response("in_progress")
                return [("response.created", {"response": response}), ("response.in_progress", {"response": response})]
            case TextDelta(text, _, logprobs):
                if not text and not logprobs:
                    return []
                told = [] if isinstance(self._open, _Message) else self._begin(_Message(self.new_id("msg"), self._next_index))
                assert isinstance(self._open, _Message)
                return [*told, *self._open.add(text, logprobs)]
            case ReasoningDelta(text):
                if not text:
                    return []
                told = []
                if not isinstance(self._open, _Reasoning):
                    told = self._begin(_Reasoning(self.new_id("rs"), self._next_index, self.summarises, self.seal))
                assert isinstance(self._open, _Reasoning)
                return [*told, *self._open.add(text)]
            case ToolCallStart(_, call_id, name):
                tool = self.tools.get(name, CalledTool("function", name))
                if tool.kind == "custom":
                    return self._begin(_CustomCall(self.new_id("ctc"), self._next_index, call_id, tool))
                return self._begin(_FunctionCall(self.new_id("fc"), self._next_index, call_id, tool))
            case ToolCallDelta(_, arguments):
                assert isinstance(self._open, _FunctionCall | _CustomCall), "a call's arguments follow its start"
                return self._open.add(arguments) if arguments else []
            case ChoiceFinished():
                self._finish = event
                return self._end_item(was_cut=_was_cut(event))
            case Finished(usage):
                response = self._final(usage)
                return [(f"response.{response['status']}", {"response": response})]

    @property
    def _next_index(self) -> int:
        return len(self._done) + (self._open is not None)

    def _begin(self, item: _Item) -> list[Told]:
        told = self._end_item(was_cut=False)
        self._open = item
        return [*told, *item.begun()]

    def _end_item(self, *, was_cut: bool) -> list[Told]:
        item, self._open = self._open, None
        if item is None:
            return []
        told = item.ended(item.stage(was_cut=was_cut))
        _, last = told[-1]
        self._done.append(last["item"])
        return told

    def _final(self, usage: Usage) -> Json:
        assert self._finish is not None, "a reply that ended has finished every choice"
        if _was_cut(self._finish):
            response = self._response("incomplete", reason="max_output_tokens", output=self._done, usage=usage)
        else:
            response = self._response("completed", output=self._done, usage=usage)
        self.ended(response)
        return response

    def _response(
        self,
        status: str,
        *,
        reason: str | None = None,
        error: Json | None = None,
        output: Sequence[Json] = (),
        usage: Usage | None = None,
    ) -> Json:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "completed_at": int(self.clock()) if status == "completed" else None,
            "error": error,
            "incomplete_details": None if reason is None else {"reason": reason},
            "model": self.model,
            "output": list(output),
            "usage": None if usage is None else _usage(usage),
            **self.given,
        }


def listed(item: Json) -> Json:
    """An item that was sent, with all that one of a list has."""
    kind = item.get("type", "message")
    written: Json = {"type": kind, **item}
    match kind:
        case "message":
            is_ours = item["role"] == "assistant"
            content = item["content"]
            if isinstance(content, str):
                content = [{"type": "output_text" if is_ours else "input_text", "text": content}]
            written |= {"status": "completed", **written, "content": [_listed_part(part, is_ours=is_ours) for part in content]}
        case "reasoning":
            written.setdefault("summary", [])
        case _:
            if kind.endswith(("_call", "_output")):
                written.setdefault("status", "completed")
    return written


def _listed_part(part: Json, *, is_ours: bool) -> Json:
    match part.get("type"):
        case "output_text" | "input_text" | "text" if is_ours:
            return {"annotations": [], "logprobs": [], **part, "type": "output_text"}
        case "text" | "output_text":
            return {**part, "type": "input_text"}
        case "input_image":
            return {"detail": "auto", **part}
        case _:
            return part


def _as_events(choice: Choice) -> Iterator[Event]:
    """A collected reply as it was told."""
    index = 0
    for part in choice.parts:
        match part:
            case Run("text", text, logprobs):
                yield TextDelta(text, logprobs=tuple(logprobs))
            case Run(_, text):
                yield ReasoningDelta(text)
            case CollectedCall(call_id, name, arguments):
                yield ToolCallStart(index, call_id, name)
                yield ToolCallDelta(index, arguments)
                index += 1
    assert choice.finish is not None, "a stream that ended has finished every choice"
    yield choice.finish


def _was_cut(finish: ChoiceFinished) -> bool:
    return finish.reason in ("length", "context_full")


def _item_added(index: int, item: Json) -> Told:
    return "response.output_item.added", {"output_index": index, "item": item}


def _item_done(index: int, item: Json) -> Told:
    return "response.output_item.done", {"output_index": index, "item": item}


def _names(tool: CalledTool) -> Json:
    return {"name": tool.name} if tool.namespace is None else {"name": tool.name, "namespace": tool.namespace}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _number(logprob: float) -> float:
    """JSON has no infinity; upstream writes this for what cannot happen."""
    return max(logprob, -9999.0)


def _logprob(token: TokenLogprob) -> Json:
    def one(t: TokenLogprob) -> Json:
        return {"token": t.token, "bytes": list(t.token_bytes), "logprob": _number(t.logprob)}

    return {**one(token), "top_logprobs": [one(alternative) for alternative in token.top]}


def _usage(used: Usage) -> Json:
    return {
        "input_tokens": used.prompt,
        "input_tokens_details": {"cached_tokens": used.cached, "cache_write_tokens": 0},
        "output_tokens": used.completion,
        "output_tokens_details": {"reasoning_tokens": used.reasoning},
        "total_tokens": used.prompt + used.completion,
    }


def _error(failure: Failure) -> Json:
    """In the few codes that a response knows."""
    message = failure.message
    match failure:
        case Failure(code="context_length_exceeded"):
            code = "context_length_exceeded"
        case Failure(status=429):
            code = "rate_limit_exceeded"
            if failure.retry_after_s is not None:
                message = f"{message} Please try again in {failure.retry_after_s}s."
        case Failure(status=400):
            code = "invalid_prompt"
        case _:
            code = "server_error"
    return {"code": code, "message": message}
