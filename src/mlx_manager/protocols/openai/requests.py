"""What an OpenAI client sends → what it wants."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from mlx_manager.core import messages as core
from mlx_manager.core.errors import InvalidField
from mlx_manager.core.requests import (
    AnyJson,
    Conversation,
    GenerationRequest,
    Grammar,
    JsonSchema,
    OneOf,
    OutputFormat,
    RawPrompt,
    Reasoning,
    ReasoningOption,
    Regex,
    ToolChoice,
    ToolSpec,
)
from mlx_manager.protocols.body import read_json_object
from mlx_manager.protocols.checked import checked
from mlx_manager.protocols.custom_tools import custom_tool, form_of, write_input
from mlx_manager.protocols.fields import Rule, invalid_field, quoted, without_nulls
from mlx_manager.protocols.json_schema import check_schema
from mlx_manager.protocols.media import check_pictures, file_parts, image_from_url, video_from_url
from mlx_manager.protocols.openai import schema
from mlx_manager.protocols.sampling import sampling, stop_strings
from mlx_manager.protocols.wire import Wanted

S = TypeVar("S", bound=schema.Generation)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIWanted(Wanted):
    """`echo` is the text of each prompt, if it is to stand before the reply (completions). `custom_tools` are the names of those that
    take a text (chat)."""

    include_usage: bool
    echo: tuple[str, ...] = ()
    custom_tools: frozenset[str] = frozenset()


def read_chat(body: bytes) -> OpenAIWanted:
    """`POST /v1/chat/completions`. Raises `InvalidField`."""
    wire, ignored = _read(body, schema.ChatRequest, schema.CHAT_FIELDS)
    limits = {wire.max_tokens, wire.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidField("'max_tokens' and 'max_completion_tokens' must not differ.", param="max_completion_tokens")
    if wire.top_logprobs is not None and not wire.logprobs:
        raise InvalidField("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    if wire.store:
        raise _unsupported("store", "nothing is stored here: use false")
    if wire.modalities is not None and wire.modalities != ["text"]:
        raise _unsupported("modalities", 'models here write text: use ["text"]')
    output, output_field = _output(wire)
    request = GenerationRequest(
        model=wire.model,
        prompts=(conversation_of(wire),),
        sampling=sampling(wire),
        max_tokens=next(iter(limits), None),
        stop=stop_strings(wire.stop),
        num_replies=1 if wire.n is None else wire.n,
        num_top_logprobs=(wire.top_logprobs or 0) if wire.logprobs else None,
        parallel_tool_calls=wire.parallel_tool_calls is not False,
        output=output,
        output_field=output_field,
    )
    custom = [(i, tool.custom) for i, tool in enumerate(wire.tools or ()) if tool.type == "custom" and tool.custom is not None]
    if custom and wire.stream:
        raise _unsupported(f"tools[{custom[0][0]}].type", "a stream tells of functions only: leave 'stream' out for custom tools")
    if any(tool.format is not None and tool.format.grammar is not None and tool.format.grammar.syntax == "lark" for _, tool in custom):
        ignored = (*ignored, "tools.custom.format")  # enforced by some models only
    return OpenAIWanted(
        request=request,
        stream=wire.stream is True,
        ignored=ignored,
        custom_tools=frozenset(tool.name for _, tool in custom),
        reasoning_fields=_reasoning_fields(wire),
        include_usage=_include_usage(wire),
    )


def conversation_of(wire: schema.ChatRequest) -> Conversation:
    """Raises `InvalidField`."""
    asked = wire.tools or []
    tools = tuple(_tool(tool, i) for i, tool in enumerate(asked))
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            where = f"tools[{i}].{asked[i].type}.name"
            raise InvalidField(f"Two tools are named '{name}': every tool needs a name of its own.", param=where)
    messages = tuple(_message(m, i) for i, m in enumerate(wire.messages))
    check_pictures(messages)
    return Conversation(
        messages=messages,
        tools=tools,
        tool_choice=_tool_choice(wire.tool_choice, names),
        reasoning=_reasoning(wire),
    )


def read_completion(body: bytes) -> OpenAIWanted:
    """`POST /v1/completions`. Raises `InvalidField`."""
    wire, ignored = _read(body, schema.CompletionRequest, schema.COMPLETION_FIELDS)
    num_replies = 1 if wire.n is None else wire.n
    if wire.best_of is not None and wire.best_of != num_replies:
        raise _unsupported("best_of", "it must equal 'n'")
    prompts = _raw_prompts(wire.prompt)
    echo: tuple[str, ...] = ()
    if wire.echo:
        if wire.logprobs is not None:
            raise _unsupported("echo", "it cannot be combined with 'logprobs'")
        if not all(isinstance(p.text, str) for p in prompts):
            raise _unsupported("echo", "it needs a prompt that is text")
        echo = tuple(p.text for p in prompts if isinstance(p.text, str))
    output, output_field = _output(wire)
    request = GenerationRequest(
        model=wire.model,
        prompts=prompts,
        sampling=sampling(wire),
        max_tokens=wire.max_tokens,
        default_max_tokens=16,
        stop=stop_strings(wire.stop),
        num_replies=num_replies,
        num_top_logprobs=wire.logprobs,
        output=output,
        output_field=output_field,
    )
    return OpenAIWanted(request=request, stream=wire.stream is True, ignored=ignored, include_usage=_include_usage(wire), echo=echo)


def _read(body: bytes, model: type[S], rules: Mapping[str, Rule]) -> tuple[S, tuple[str, ...]]:
    wire, ignored = checked(body, model, rules)
    if wire.stream_options is not None and not wire.stream:
        raise InvalidField("'stream_options' needs 'stream' to be true.", param="stream_options")
    return wire, ignored


def _include_usage(wire: schema.Generation) -> bool:
    return wire.stream_options is not None and wire.stream_options.include_usage is True


def _raw_prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> tuple[RawPrompt, ...]:
    if isinstance(prompt, str):
        return (RawPrompt(prompt),)
    if isinstance(prompt[0], int):
        return (RawPrompt(tuple(t for t in prompt if isinstance(t, int))),)
    return tuple(RawPrompt(p if isinstance(p, str) else tuple(p)) for p in prompt if not isinstance(p, int))


def _message(wire: schema.Message, index: int) -> core.Message:
    where = f"messages[{index}]"
    content = _content(wire, where)
    match wire.role:
        case "system" | "developer":
            return core.Message("system", content, name=wire.name)
        case "user":
            return core.Message("user", content, name=wire.name)
        case "assistant":
            calls = tuple(_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(wire.tool_calls or ()))
            reasoning = wire.reasoning_content if wire.reasoning_content is not None else wire.reasoning
            return core.Message("assistant", content, reasoning=reasoning, tool_calls=calls, name=wire.name)
        case "tool" | "function":
            if wire.role == "tool" and wire.tool_call_id is None:
                raise InvalidField("A tool message needs 'tool_call_id'.", param=f"{where}.tool_call_id", code="missing_required_parameter")
            return core.Message("tool", content, tool_call_id=wire.tool_call_id, name=wire.name)


def _call(wire: schema.ToolCall, where: str) -> core.ToolCall:
    if wire.type == "custom":
        if wire.custom is None:
            raise _missing(f"{where}.custom")
        return core.ToolCall(wire.id, wire.custom.name, write_input(wire.custom.input))
    if wire.function is None:
        raise _missing(f"{where}.function")
    return core.ToolCall(wire.id, wire.function.name, "" if wire.function.arguments is None else wire.function.arguments)


def _content(wire: schema.Message, where: str) -> core.Content:
    if wire.content is None:
        if wire.role == "assistant":
            return "" if wire.refusal is None else wire.refusal
        raise InvalidField(f"A {wire.role} message needs 'content'.", param=f"{where}.content", code="missing_required_parameter")
    if isinstance(wire.content, str):
        return wire.content
    return core.content_of([said for i, part in enumerate(wire.content) for said in _parts(part, wire.role, f"{where}.content[{i}]")])


def _parts(wire: schema.Part, role: str, where: str) -> Sequence[core.Part]:
    match wire.type:
        case "text":
            if wire.text is None:
                raise _missing(f"{where}.text")
            return (wire.text,)
        case "refusal":
            if wire.refusal is None:
                raise _missing(f"{where}.refusal")
            return (wire.refusal,)
        case "image_url":
            if wire.image_url is None:
                raise _missing(f"{where}.image_url")
            _check_shows(role, where)
            return (image_from_url(wire.image_url.url, f"{where}.image_url"),)
        case "video_url":
            if wire.video_url is None:
                raise _missing(f"{where}.video_url")
            _check_shows(role, where)
            return (video_from_url(wire.video_url.url, wire.video_url.num_frames, f"{where}.video_url"),)
        case "file":
            return file_parts(wire.file or {}, f"{where}.file")
        case "input_audio":
            message = f"No model here hears: it cannot take a part of type '{wire.type}' in '{where}.type'."
            raise InvalidField(message, param=f"{where}.type", code="unsupported_value")


def _check_shows(role: str, where: str) -> None:
    if role not in ("user", "tool"):
        raise _unsupported(f"{where}.type", f"a {role} message holds text only")


def _tool(wire: schema.Tool, index: int) -> ToolSpec:
    if wire.type == "custom":
        if wire.custom is None:
            raise _missing(f"tools[{index}].custom")
        return _custom_tool(wire.custom, f"tools[{index}].custom")
    if wire.function is None:
        raise _missing(f"tools[{index}].function")
    check_schema(wire.function.parameters or {}, f"tools[{index}].function.parameters", strict=wire.function.strict is True)
    return ToolSpec(
        wire.function.name,
        wire.function.description,
        MappingProxyType(wire.function.parameters or {}),
        strict=wire.function.strict is True,
    )


def _custom_tool(wire: schema.Custom, where: str) -> ToolSpec:
    form = None
    if wire.format is not None and wire.format.type == "grammar":
        if wire.format.grammar is None:
            raise _missing(f"{where}.format.grammar")
        form = form_of(wire.format.grammar.syntax, wire.format.grammar.definition, f"{where}.format.grammar")
    return custom_tool(wire.name, [wire.description], form)


def _tool_choice(choice: str | dict[str, Any] | None, names: Sequence[str]) -> ToolChoice:
    """Raises `InvalidField` for a choice among tools that are not there."""
    where = "tool_choice"
    match choice:
        case None | "auto":
            return ToolChoice()
        case "none":
            return ToolChoice("none")
        case "required":
            chosen = ToolChoice("required")
        case {"type": "function", "function": {"name": str(name)}}:
            where, chosen = "tool_choice.function.name", ToolChoice("required", (name,))
        case {"type": "custom", "custom": {"name": str(name)}}:
            where, chosen = "tool_choice.custom.name", ToolChoice("required", (name,))
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list()}}:
            where = "tool_choice.allowed_tools.tools"
            entries = cast(list[object], choice["allowed_tools"]["tools"])
            chosen = ToolChoice(mode, tuple(_allowed(entry, where) for entry in entries))
        case _:
            raise InvalidField(
                f"Invalid value for 'tool_choice': {quoted(choice)}. Supported values are: 'none', 'auto', 'required', a function or "
                "a custom tool by its name, or 'allowed_tools'.",
                param="tool_choice",
            )
    if not names:
        raise InvalidField(f"Invalid value for '{where}': there are no 'tools' to call.", param=where)
    for name in chosen.names or ():
        if name not in names:
            raise InvalidField(f"Invalid value for '{where}': there is no tool named {quoted(name)} in 'tools'.", param=where)
    return chosen


def _allowed(entry: object, where: str) -> str:
    match entry:
        case {"type": "function", "function": {"name": str(name)}} | {"type": "custom", "custom": {"name": str(name)}}:
            return name
        case _:
            raise InvalidField(f"Invalid value for '{where}': each entry must be a function or a custom tool with its name.", param=where)


def _output(wire: schema.ChatRequest | schema.CompletionRequest) -> tuple[OutputFormat | None, str]:
    """The form that the answer must have, and the field that says so."""
    asked: dict[str, OutputFormat] = {}
    if isinstance(wire, schema.ChatRequest) and wire.response_format is not None:
        match wire.response_format:
            case schema.ResponseFormat(type="json_object"):
                asked["response_format"] = AnyJson()
            case schema.ResponseFormat(type="json_schema", json_schema=None):
                raise _missing("response_format.json_schema")
            case schema.ResponseFormat(type="json_schema", json_schema=schema.NamedSchema() as named):
                where = "response_format.json_schema.schema"
                wanted = JsonSchema(named.json_schema or {}, strict=named.strict is True)
                check_schema(named.json_schema or {}, where, strict=wanted.strict)
                asked[where] = wanted
            case _:
                pass
    extensions = wire.structured_outputs or schema.StructuredOutputs()
    for name in ("json", "regex", "choice", "grammar"):
        for where, value in (
            (f"structured_outputs.{name}", getattr(extensions, "json_" if name == "json" else name)),
            (f"guided_{name}", getattr(wire, f"guided_{name}")),
        ):
            if value is not None:
                asked[where] = _extension(name, value, where)
    if len(asked) > 1:
        fields = " and ".join(f"'{name}'" for name in asked)
        raise InvalidField(f"{fields} cannot be combined: a reply has one form.", param=list(asked)[-1])
    return next(((output, where) for where, output in asked.items()), (None, "response_format"))


def _extension(name: str, value: Any, where: str) -> OutputFormat:
    match name:
        case "json":
            if isinstance(value, str):
                try:
                    value = read_json_object(value.encode())
                except InvalidField:
                    raise InvalidField(f"Invalid '{where}': it is not a JSON Schema.", param=where) from None
            check_schema(value, where)
            return JsonSchema(MappingProxyType(value))
        case "regex":
            return Regex(value)
        case "choice":
            return OneOf(tuple(value))
        case _:
            return Grammar(value)


def _missing(param: str) -> InvalidField:
    return InvalidField(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


_TEMPLATE_OPTIONS = ("enable_thinking", "reasoning_effort", "thinking_budget")


def _reasoning(wire: schema.ChatRequest) -> Reasoning:
    """A field of its own counts before the same in `chat_template_kwargs`."""
    options = without_nulls(wire.chat_template_kwargs or {})
    for key in options:
        if key not in _TEMPLATE_OPTIONS:
            where = f"chat_template_kwargs.{key[:64]}"
            known = ", ".join(f"'{option}'" for option in _TEMPLATE_OPTIONS)
            raise InvalidField(f"'{where}' is not supported: the options are {known}.", param=where, code="unsupported_parameter")
    try:
        given = schema.ReasoningOptions.model_validate(options)
    except ValidationError as error:
        mistake = invalid_field(error, options)
        raise InvalidField(
            mistake.message.replace(f"'{mistake.param}'", f"'chat_template_kwargs.{mistake.param}'"),
            param=f"chat_template_kwargs.{mistake.param}",
            code=mistake.code,
        ) from None

    return Reasoning(
        enabled=given.enable_thinking if wire.enable_thinking is None else wire.enable_thinking,
        effort=given.reasoning_effort if wire.reasoning_effort is None else wire.reasoning_effort,
        budget=given.thinking_budget if wire.thinking_budget is None else wire.thinking_budget,
    )


def _reasoning_fields(wire: schema.ChatRequest) -> Mapping[ReasoningOption, tuple[str, ...]]:
    """The fields that said something of reasoning."""
    options = without_nulls(wire.chat_template_kwargs or {})
    named: tuple[tuple[ReasoningOption, str, object], ...] = (
        ("enabled", "enable_thinking", wire.enable_thinking),
        ("effort", "reasoning_effort", wire.reasoning_effort),
        ("budget", "thinking_budget", wire.thinking_budget),
    )
    return MappingProxyType(
        {
            option: ((name,) if value is not None else ()) + ((f"chat_template_kwargs.{name}",) if name in options else ())
            for option, name, value in named
        }
    )


def _unsupported(param: str, why: str) -> InvalidField:
    return InvalidField(f"This value of '{param}' is not supported: {why}.", param=param, code="unsupported_value")
