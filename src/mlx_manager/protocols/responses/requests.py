"""What a client of the Responses API sends → what it wants."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol, cast

from mlx_manager.core import messages as core
from mlx_manager.core.errors import InvalidField, NotFound
from mlx_manager.core.requests import (
    AnyJson,
    Conversation,
    GenerationRequest,
    Grammar,
    JsonSchema,
    OutputFormat,
    Reasoning,
    ReasoningOption,
    ToolChoice,
    ToolSpec,
)
from mlx_manager.protocols.body import read_json_object
from mlx_manager.protocols.checked import checked_object
from mlx_manager.protocols.custom_tools import custom_tool, form_of, write_input
from mlx_manager.protocols.fields import quoted, without_nulls
from mlx_manager.protocols.json_schema import check_schema
from mlx_manager.protocols.media import check_pictures, file_parts, image_from_url
from mlx_manager.protocols.responses import schema
from mlx_manager.protocols.responses.history import Item, Kept
from mlx_manager.protocols.sampling import sampling, stop_strings
from mlx_manager.protocols.seal import Seal
from mlx_manager.protocols.wire import Json, Wanted

LOGPROBS = "message.output_text.logprobs"
_ALWAYS_INCLUDED = "reasoning.encrypted_content"
# A client's own words in an answer.
_MAX_QUOTED = 256


@dataclass(frozen=True, slots=True)
class CalledTool:
    """What the client calls a tool that the model knows under one flat name."""

    kind: Literal["function", "custom"]
    name: str
    namespace: str | None = None

    @property
    def flat(self) -> str:
        return flat_name(self.namespace, self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesWanted(Wanted):
    """`given` are the fields of the response that say what was asked for; `tools` are by the names that the model knows.
    `items` is the whole input, with what the client only referred to: an `Item` where it is kept already, else as it was sent."""

    given: Json
    tools: Mapping[str, CalledTool]
    summarises: bool
    keeps: bool
    items: tuple[Item | Json, ...]


class Past(Protocol):
    """What one client may refer to."""

    def response(self, response_id: str) -> Kept | None: ...
    def item(self, item_id: str) -> Item | None: ...


def flat_name(namespace: str | None, name: str) -> str:
    return name if namespace is None else f"{namespace}.{name}"


def read_responses(body: bytes, past: Past, seal: Seal) -> ResponsesWanted:
    """`POST /v1/responses` and `/v1/responses/input_tokens`. Raises `InvalidField`, and `NotFound` for an item that is not kept."""
    given = without_nulls(read_json_object(body))
    wire, ignored = checked_object(given, schema.ResponsesRequest, schema.RESPONSES_FIELDS)
    _check(wire)
    tools = _Tools()
    for i, tool in enumerate(wire.tools or ()):
        tools.add(tool, f"tools[{i}]")
    echoed = tuple(tools.echoed)
    entries = list(_entries(wire, given.get("input"), past))
    reader = _ItemReader(seal, tools)
    for entry in entries:
        reader.read(entry.wire, entry.where)
    spoken = reader.finish() or [core.Message("user", "")]  # a probe: there must be something to render
    check_pictures(spoken)
    instructions = [] if wire.instructions is None else [core.Message("system", wire.instructions)]
    wants_logprobs = LOGPROBS in (wire.include or ())
    output, output_field = _output(wire.text)
    reasoning = wire.reasoning or schema.ReasoningOptions()
    summary = reasoning.generate_summary if reasoning.summary is None else reasoning.summary
    request = GenerationRequest(
        model=wire.model,
        prompts=(
            Conversation(
                messages=(*instructions, *spoken),
                tools=tuple(tools.specs),
                tool_choice=_tool_choice(wire.tool_choice, tools),
                reasoning=Reasoning(wire.enable_thinking, reasoning.effort, wire.thinking_budget),
            ),
        ),
        sampling=sampling(wire),
        max_tokens=wire.max_output_tokens,
        stop=stop_strings(wire.stop),
        num_top_logprobs=(wire.top_logprobs or 0) if wants_logprobs else None,
        output=output,
        output_field=output_field,
        parallel_tool_calls=wire.parallel_tool_calls is not False,
    )
    without_effect = list(ignored)
    if wire.top_logprobs is not None and not wants_logprobs:
        without_effect.append("top_logprobs")
    without_effect += [f"include.{value}" for value in wire.include or () if value not in (LOGPROBS, _ALWAYS_INCLUDED)]
    return ResponsesWanted(
        request=request,
        stream=wire.stream is True,
        ignored=tuple(dict.fromkeys([*without_effect, *tools.ignored, *reader.ignored])),
        reasoning_fields=_reasoning_fields(wire),
        given={
            "instructions": wire.instructions,
            "max_output_tokens": wire.max_output_tokens,
            "metadata": wire.metadata,
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": wire.previous_response_id,
            "reasoning": {"effort": reasoning.effort, "summary": summary},
            "safety_identifier": wire.safety_identifier,
            "service_tier": "default",
            "store": wire.store is not False,
            "temperature": wire.temperature,
            "text": {"format": _echoed_format(wire.text)},
            "tool_choice": "auto" if wire.tool_choice is None else wire.tool_choice,
            "tools": echoed,
            "top_logprobs": wire.top_logprobs,
            "top_p": wire.top_p,
            "truncation": "disabled",
            "user": wire.user,
        },
        tools=MappingProxyType(_by_name(tools.called)),
        summarises=summary is not None,
        keeps=wire.store is not False,
        items=tuple(entry.item for entry in entries),
    )


def _check(wire: schema.ResponsesRequest) -> None:
    if wire.background:
        raise _unsupported("background", "a response is made while its client waits: use false")
    if wire.truncation == "auto":
        raise _unsupported("truncation", "no input is cut in silence: use 'disabled'")
    if wire.stream_options is not None and not wire.stream:
        raise InvalidField("'stream_options' needs 'stream' to be true.", param="stream_options")
    if wire.input is None and wire.previous_response_id is None:
        raise _missing("input")


def _reasoning_fields(wire: schema.ResponsesRequest) -> Mapping[ReasoningOption, tuple[str, ...]]:
    """The fields that said something of reasoning."""
    fields: dict[ReasoningOption, tuple[str, ...]] = {}
    if wire.enable_thinking is not None:
        fields["enabled"] = ("enable_thinking",)
    if wire.reasoning is not None and wire.reasoning.effort is not None:
        fields["effort"] = ("reasoning.effort",)
    if wire.thinking_budget is not None:
        fields["budget"] = ("thinking_budget",)
    return MappingProxyType(fields)


def _output(text: schema.TextOptions | None) -> tuple[OutputFormat | None, str]:
    """The form that the answer must have, and the field that says so."""
    match text.format if text is not None else None:
        case schema.TextFormat(type="json_object"):
            return AnyJson(), "text.format"
        case schema.TextFormat(type="json_schema") as asked:
            for name, value in (("name", asked.name), ("schema", asked.json_schema)):
                if value is None:
                    raise _missing(f"text.format.{name}")
            check_schema(asked.json_schema or {}, "text.format.schema", strict=asked.strict is True)
            return JsonSchema(MappingProxyType(asked.json_schema or {}), strict=asked.strict is True), "text.format.schema"
        case _:
            return None, "text.format"


def _echoed_format(text: schema.TextOptions | None) -> Json:
    match text.format if text is not None else None:
        case schema.TextFormat(type="json_schema") as asked:
            form = {"name": asked.name, "description": asked.description, "schema": asked.json_schema, "strict": asked.strict is True}
            return {"type": "json_schema", **form}
        case schema.TextFormat(type=kind):
            return {"type": kind}
        case None:
            return {"type": "text"}


# ---- the input


@dataclass(frozen=True, slots=True)
class _Entry:
    """One item of the input; `where` it stands in the body, `item` as it is to be kept."""

    wire: schema.Item
    where: str
    item: Item | Json


def _entries(wire: schema.ResponsesRequest, raw: Any, past: Past) -> Iterable[_Entry]:
    """All items, those that the client only refers to in their place."""
    if wire.previous_response_id is not None:
        before = past.response(wire.previous_response_id)
        if before is None:
            raise InvalidField(
                f"Previous response with id '{wire.previous_response_id[:_MAX_QUOTED]}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        for item in before.items:
            yield _Entry(schema.ITEM.validate_python(item.json), "previous_response_id", item)
    if isinstance(wire.input, str):
        message = schema.Message(role="user", content=wire.input)
        yield _Entry(message, "input", {"type": "message", "role": "user", "content": wire.input})
    else:
        for i, item in enumerate(wire.input or ()):
            if not isinstance(item, schema.ItemReference):
                yield _Entry(item, f"input[{i}]", cast(Json, raw[i]))
            elif (found := past.item(item.id)) is not None:
                yield _Entry(schema.ITEM.validate_python(found.json), f"input[{i}]", found)
            else:
                raise NotFound(f"Item with id '{item.id[:_MAX_QUOTED]}' not found.", param="input")


@dataclass(slots=True)
class _Turn:
    """What the assistant says before somebody else speaks: neighbouring items are one message, as a chat's history has it."""

    reasoning: str | None = None
    text: str = ""
    has_text: bool = False
    calls: list[core.ToolCall] = field(default_factory=list[core.ToolCall])

    def reason(self, text: str) -> None:
        self.reasoning = text if self.reasoning is None else self.reasoning + text

    def say(self, text: str) -> None:
        self.text += text
        self.has_text = True

    @property
    def message(self) -> core.Message | None:
        if self.reasoning is None and not self.has_text and not self.calls:
            return None
        return core.Message("assistant", self.text, reasoning=self.reasoning, tool_calls=tuple(self.calls))


class _ItemReader:
    """Reads items in their order. `ignored` are those, and fields of those, that have no effect."""

    def __init__(self, seal: Seal, tools: "_Tools") -> None:
        self._seal = seal
        self._tools = tools
        self._messages: list[core.Message] = []
        self._turn = _Turn()
        self.ignored: list[str] = []

    def finish(self) -> list[core.Message]:
        self._end_turn()
        return self._messages

    def read(self, item: schema.Item, where: str) -> None:
        match item:
            case schema.Message(role="assistant"):
                content = core.Message("assistant", self._content(item.content, f"{where}.content", "assistant"))
                self._turn.say(content.text)
            case schema.Message():
                role = "user" if item.role == "user" else "system"
                self._add(core.Message(role, self._content(item.content, f"{where}.content", role)))
            case schema.Reasoning():
                self._reason(item)
            case schema.FunctionCall():
                self._turn.calls.append(core.ToolCall(item.call_id, flat_name(item.namespace, item.name), item.arguments))
            case schema.CustomCall():
                self._turn.calls.append(core.ToolCall(item.call_id, flat_name(item.namespace, item.name), write_input(item.input)))
            case schema.CallOutput():
                self._add(core.Message("tool", self._content(item.output, f"{where}.output", "tool"), tool_call_id=item.call_id))
            case schema.ShellCall():
                done = without_nulls(item.action or item.operation or {})
                if item.type == "local_shell_call":
                    done.pop("type", None)  # there is one
                name = item.type.removesuffix("_call")
                self._turn.calls.append(core.ToolCall(item.call_id, name, json.dumps(done, ensure_ascii=False)))
            case schema.ShellCallOutput():
                self._add(_shell_output(item, where))
            case schema.MoreTools():
                for tool in item.tools:
                    self._tools.add(tool, None)
            case schema.ToolSearchCall():
                self._turn.say(f"[Looked for tools: {json.dumps(item.arguments, ensure_ascii=False)}]")
            case schema.OtherItem(type="compaction_trigger"):
                raise _unsupported(f"{where}.type", "nothing is compacted here")
            case schema.OtherItem():
                self.ignored.append(f"input.{item.type}")
            case schema.ItemReference():
                raise AssertionError("references have been followed")

    def _add(self, message: core.Message) -> None:
        self._end_turn()
        self._messages.append(message)

    def _end_turn(self) -> None:
        if (message := self._turn.message) is not None:
            self._messages.append(message)
        self._turn = _Turn()

    def _reason(self, item: schema.Reasoning) -> None:
        """Ours is what was sealed, or nothing; of others what can be read."""
        sealed = item.encrypted_content
        if sealed is not None and self._seal.is_ours(sealed):
            text = self._seal.open(sealed)
            if text is None:
                self.ignored.append("input.encrypted_content")
        else:
            if sealed is not None:
                self.ignored.append("input.encrypted_content")
            text = "".join(_texts(item.content)) if item.content else "\n\n".join(_texts(item.summary)) or None
        if text is not None:
            self._turn.reason(text)

    def _content(self, content: schema.Content, where: str, role: str) -> core.Content:
        if isinstance(content, str):
            return content
        parts: list[core.Part] = []
        for i, part in enumerate(content):
            match part:
                case schema.Part():
                    parts += _parts(part, f"{where}[{i}]", role)
                case schema.OtherPart():
                    self.ignored.append(f"input.content.{part.type}")
        return core.content_of(parts)


def _parts(part: schema.Part, where: str, role: str) -> Sequence[core.Part]:
    match part.type:
        case "input_text" | "output_text" | "text":
            if part.text is None:
                raise _missing(f"{where}.text")
            return (part.text,)
        case "refusal":
            if part.refusal is None:
                raise _missing(f"{where}.refusal")
            return (part.refusal,)
        case "input_image":
            if role not in ("user", "tool"):
                raise _unsupported(f"{where}.type", f"a {role} message holds text only")
            if part.image_url is None:
                raise InvalidField(
                    f"Invalid '{where}': pictures are taken by 'image_url' only; nothing is stored here.", param=f"{where}.image_url"
                )
            return (image_from_url(part.image_url, f"{where}.image_url"),)
        case "input_file":
            return file_parts({"file_data": part.file_data, "filename": part.filename}, where)
        case "input_audio":
            message = f"No model here hears: it cannot take a part of type '{part.type}' in '{where}.type'."
            raise InvalidField(message, param=f"{where}.type", code="unsupported_value")


def _shell_output(item: schema.ShellCallOutput, where: str) -> core.Message:
    call_id = item.id if item.call_id is None else item.call_id
    if call_id is None:
        raise _missing(f"{where}.call_id")
    match item.output:
        case None:
            content = "" if item.status is None else item.status
        case str(text):
            content = text
        case list():
            content = json.dumps(item.output, ensure_ascii=False)
    return core.Message("tool", content, tool_call_id=call_id)


def _texts(parts: Sequence[object] | None) -> list[str]:
    texts = [cast(dict[str, object], part).get("text") for part in parts or () if isinstance(part, dict)]
    return [text for text in texts if isinstance(text, str)]


# ---- tools


def _by_name(called: Mapping[str, CalledTool]) -> dict[str, CalledTool]:
    """Models leave the namespace away at times: a name that only one tool has is that tool's."""
    names = Counter(tool.name for tool in called.values())
    return {tool.name: tool for tool in called.values() if names[tool.name] == 1} | dict(called)


class _Tools:
    """The tools that the model may call (`specs`), and what the client calls them."""

    def __init__(self) -> None:
        self.specs: list[ToolSpec] = []
        self.called: dict[str, CalledTool] = {}
        self.echoed: list[Json] = []
        self.ignored: list[str] = []

    def add(self, tool: schema.Tool, where: str | None) -> None:
        """`where` is None for a tool that may be there already: then the first stays."""
        match tool:
            case schema.FunctionTool() | schema.CustomTool():
                self._add(tool, None, None, where)
                self.echoed.append(_echoed(tool))
            case schema.NamespaceTool():
                # What a namespace is for is said once, at its first tool.
                about = tool.description
                known: list[Json] = []
                for i, inner in enumerate(tool.tools):
                    if isinstance(inner, schema.OtherTool):
                        self._drop(inner)
                        continue
                    self._add(inner, tool.name, about, None if where is None else f"{where}.tools[{i}]")
                    known.append(_echoed(inner))
                    about = None
                description = "" if tool.description is None else tool.description
                self.echoed.append({"type": "namespace", "name": tool.name, "description": description, "tools": known})
            case schema.OtherTool():
                self._drop(tool)

    def _drop(self, tool: schema.OtherTool) -> None:
        self.ignored.append(f"tools.{tool.type}")

    def _add(self, tool: schema.FunctionTool | schema.CustomTool, namespace: str | None, about: str | None, where: str | None) -> None:
        called = CalledTool(tool.type, tool.name, namespace)
        if called.flat in self.called:
            if where is None:
                return
            message = f"Two tools are named '{called.flat}': every tool needs a name of its own."
            raise InvalidField(message, param=f"{where}.name")
        self.called[called.flat] = called
        lines = [about, tool.description]
        match tool:
            case schema.FunctionTool():
                parameters, strict = tool.parameters or {}, tool.strict is True
                check_schema(parameters, f"{where or 'input.tools'}.parameters", strict=strict)
                said = [line for line in lines if line is not None]
                spec = ToolSpec(called.flat, "\n".join(said) if said else None, MappingProxyType(parameters), strict=strict)
            case schema.CustomTool(format=asked):
                form = None
                if asked is not None and asked.type == "grammar":
                    form = form_of(asked.syntax, asked.definition, f"{where or 'input.tools'}.format")
                spec = custom_tool(called.flat, lines, form)
                if isinstance(form, Grammar):
                    self.ignored.append("tools.format")  # enforced by some models only
        self.specs.append(spec)


def _echoed(tool: schema.FunctionTool | schema.CustomTool) -> Json:
    match tool:
        case schema.FunctionTool():
            said = {"type": "function", "name": tool.name, "description": tool.description}
            return {**said, "parameters": tool.parameters, "strict": tool.strict is True}
        case schema.CustomTool():
            return without_nulls(
                {
                    "type": "custom",
                    "name": tool.name,
                    "description": tool.description,
                    "format": None if tool.format is None else tool.format.model_dump(exclude_none=True),
                }
            )


def _tool_choice(choice: str | dict[str, Any] | None, tools: _Tools) -> ToolChoice:
    """Raises `InvalidField` for a choice among tools that are not there."""
    where = "tool_choice"
    match choice:
        case None | "auto":
            return ToolChoice()
        case "none":
            return ToolChoice("none")
        case "required":
            chosen = ToolChoice("required")
        case {"type": "function" | "custom", "name": str(name)}:
            where, chosen = "tool_choice.name", ToolChoice("required", (_named(choice, name),))
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": list()}:
            where = "tool_choice.tools"
            chosen = ToolChoice(mode, tuple(_allowed(cast(list[object], choice["tools"]), where)))
            if mode == "auto" and not chosen.names:
                return chosen
        case {"type": str(kind)} if kind not in ("function", "custom", "allowed_tools"):
            raise _unsupported("tool_choice", f"no tool of type {quoted(kind)} is run here")
        case _:
            raise InvalidField(
                f"Invalid value for 'tool_choice': {quoted(choice)}. Supported values are: 'none', 'auto', 'required', a function or a "
                "custom tool by its name, or 'allowed_tools'.",
                param="tool_choice",
            )
    if not tools.called or chosen.names == ():
        raise InvalidField(f"Invalid value for '{where}': there are no 'tools' to call.", param=where)
    for name in chosen.names or ():
        if name not in tools.called:
            raise InvalidField(f"Invalid value for '{where}': there is no tool named {quoted(name)} in 'tools'.", param=where)
    return chosen


def _named(entry: dict[str, Any], name: str) -> str:
    namespace = entry.get("namespace")
    return flat_name(namespace if isinstance(namespace, str) else None, name)


def _allowed(entries: Sequence[object], where: str) -> Iterable[str]:
    """The names of those that can be called here."""
    for entry in entries:
        match entry:
            case {"type": "function" | "custom", "name": str(name)}:
                yield _named(cast(dict[str, Any], entry), name)
            case {"type": str(kind)} if kind not in ("function", "custom"):
                pass
            case _:
                raise InvalidField(f"Invalid value for '{where}': each entry must be a tool with its type and name.", param=where)


def _missing(param: str) -> InvalidField:
    return InvalidField(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def _unsupported(param: str, why: str) -> InvalidField:
    return InvalidField(f"This value of '{param}' is not supported: {why}.", param=param, code="unsupported_value")
