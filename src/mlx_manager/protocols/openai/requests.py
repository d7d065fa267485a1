"""What an OpenAI client sends → what it wants."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import ValidationError

from mlx_manager.core import messages as core
from mlx_manager.core.errors import InvalidField
from mlx_manager.core.requests import Conversation, GenerationRequest, RawPrompt, Sampling, ToolSpec
from mlx_manager.protocols.body import read_json_object
from mlx_manager.protocols.fields import Rule, ignored_fields, invalid_field, quoted, unknown_inside, without_nulls
from mlx_manager.protocols.openai import schema

S = TypeVar("S", bound=schema.Sampling)


@dataclass(frozen=True, slots=True)
class Wanted:
    """`request` is for the gateway; the rest is how the reply is to be written. `ignored` are fields without effect;
    `option_fields` says which fields a template option came from, should it turn out to have none."""

    request: GenerationRequest
    stream: bool
    include_usage: bool
    ignored: tuple[str, ...]
    option_fields: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    echo: tuple[str, ...] = ()  # completions: the text of each prompt, if it is to stand before the reply

    def without_effect(self, unused_options: tuple[str, ...]) -> tuple[str, ...]:
        """All fields without effect, now that the model has said which options it has no use for."""
        return (*self.ignored, *(name for option in unused_options for name in self.option_fields.get(option, ())))


def read_chat(body: bytes) -> Wanted:
    """`POST /v1/chat/completions`. Raises `InvalidField`."""
    wire, ignored = _read(body, schema.ChatRequest, schema.CHAT_FIELDS)
    limits = {wire.max_tokens, wire.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidField("'max_tokens' and 'max_completion_tokens' must not differ.", param="max_completion_tokens")
    if wire.top_logprobs is not None and not wire.logprobs:
        raise InvalidField("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    if wire.response_format is not None and wire.response_format.type != "text":
        raise _unsupported("response_format.type", "structured output is not built yet: use 'text'")
    if wire.store:
        raise _unsupported("store", "nothing is stored here: use false")
    if wire.modalities is not None and wire.modalities != ["text"]:
        raise _unsupported("modalities", 'models here write text: use ["text"]')
    tools = tuple(_tool(tool, i) for i, tool in enumerate(wire.tools or ()))
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidField(f"Two tools are named '{name}': every tool needs a name of its own.", param=f"tools[{i}].function.name")
    conversation = Conversation(
        messages=tuple(_message(m, i) for i, m in enumerate(wire.messages)),
        tools=tools if _may_call(wire.tool_choice) else (),
        template_options=_template_options(wire),
    )
    request = GenerationRequest(
        model=wire.model,
        prompts=(conversation,),
        sampling=_sampling(wire),
        max_tokens=next(iter(limits), None),
        stop=_stop(wire),
        num_replies=1 if wire.n is None else wire.n,
        num_top_logprobs=(wire.top_logprobs or 0) if wire.logprobs else None,
        parallel_tool_calls=wire.parallel_tool_calls is not False,
    )
    option_fields = MappingProxyType({"enable_thinking": _thinking_fields(wire)})
    return Wanted(request, wire.stream is True, _include_usage(wire), ignored, option_fields)


def read_completion(body: bytes) -> Wanted:
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
    request = GenerationRequest(
        model=wire.model,
        prompts=prompts,
        sampling=_sampling(wire),
        max_tokens=16 if wire.max_tokens is None else wire.max_tokens,  # this endpoint's documented default
        stop=_stop(wire),
        num_replies=num_replies,
        num_top_logprobs=wire.logprobs,
    )
    return Wanted(request, wire.stream is True, _include_usage(wire), ignored, echo=echo)


def _read(body: bytes, model: type[S], rules: Mapping[str, Rule]) -> tuple[S, tuple[str, ...]]:
    given = without_nulls(read_json_object(body))
    ignored = ignored_fields(given, rules)
    try:
        wire = model.model_validate(given)
    except ValidationError as error:
        raise invalid_field(error, given) from None
    if wire.stream_options is not None and not wire.stream:
        raise InvalidField("'stream_options' needs 'stream' to be true.", param="stream_options")
    return wire, ignored + unknown_inside(wire)


def _include_usage(wire: schema.Sampling) -> bool:
    return wire.stream_options is not None and wire.stream_options.include_usage is True


def _sampling(wire: schema.Sampling) -> Sampling:
    return Sampling(
        temperature=wire.temperature,
        top_p=wire.top_p,
        top_k=wire.top_k,
        min_p=wire.min_p,
        repetition_penalty=wire.repetition_penalty,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        seed=wire.seed,
        logit_bias=MappingProxyType({int(token): bias for token, bias in (wire.logit_bias or {}).items()}),
    )


def _stop(wire: schema.Sampling) -> tuple[str, ...]:
    return (wire.stop,) if isinstance(wire.stop, str) else tuple(wire.stop or ())


def _raw_prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> tuple[RawPrompt, ...]:
    if isinstance(prompt, str):
        return (RawPrompt(prompt),)
    if isinstance(prompt[0], int):
        return (RawPrompt(tuple(t for t in prompt if isinstance(t, int))),)
    return tuple(RawPrompt(p if isinstance(p, str) else tuple(p)) for p in prompt if not isinstance(p, int))


def _message(wire: schema.Message, index: int) -> core.Message:
    where = f"messages[{index}]"
    content = _text(wire, where)
    match wire.role:
        case "system" | "developer":
            return core.Message("system", content, name=wire.name)
        case "user":
            return core.Message("user", content, name=wire.name)
        case "assistant":
            calls = tuple(
                core.ToolCall(c.id, c.function.name, "" if c.function.arguments is None else c.function.arguments)
                for c in wire.tool_calls or ()
            )
            reasoning = wire.reasoning_content if wire.reasoning_content is not None else wire.reasoning
            return core.Message("assistant", content, reasoning=reasoning, tool_calls=calls, name=wire.name)
        case "tool" | "function":
            if wire.role == "tool" and wire.tool_call_id is None:
                raise InvalidField("A tool message needs 'tool_call_id'.", param=f"{where}.tool_call_id", code="missing_required_parameter")
            return core.Message("tool", content, tool_call_id=wire.tool_call_id, name=wire.name)


def _text(wire: schema.Message, where: str) -> str:
    if wire.content is None:
        if wire.role == "assistant":
            return "" if wire.refusal is None else wire.refusal
        raise InvalidField(f"A {wire.role} message needs 'content'.", param=f"{where}.content", code="missing_required_parameter")
    if isinstance(wire.content, str):
        return wire.content
    return "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(wire.content))


def _part(wire: schema.Part, where: str) -> str:
    if wire.type not in ("text", "refusal"):
        message = f"This model reads text only: it cannot take a part of type '{wire.type}' in '{where}.type'."
        raise InvalidField(message, param=f"{where}.type", code="unsupported_value")
    text = wire.text if wire.type == "text" else wire.refusal
    if text is None:
        raise InvalidField(
            f"Missing required parameter: '{where}.{wire.type}'.", param=f"{where}.{wire.type}", code="missing_required_parameter"
        )
    return text


def _tool(wire: schema.Tool, index: int) -> ToolSpec:
    if wire.function.strict:
        raise _unsupported(f"tools[{index}].function.strict", "structured output is not built yet")
    return ToolSpec(wire.function.name, wire.function.description, MappingProxyType(wire.function.parameters or {}))


def _may_call(choice: str | dict[str, Any] | None) -> bool:
    match choice:
        case None | "auto":
            return True
        case "none":
            return False
        case "required" | dict():
            raise _unsupported("tool_choice", "only 'auto' and 'none' are, until structured output is built")
        case _:
            raise InvalidField(
                f"Invalid value for 'tool_choice': {quoted(choice)}. Supported values are: 'auto' or 'none'.", param="tool_choice"
            )


def _template_options(wire: schema.ChatRequest) -> Mapping[str, Any]:
    options = without_nulls(wire.chat_template_kwargs or {})
    for key, value in options.items():
        where = f"chat_template_kwargs.{key[:64]}"
        if key != "enable_thinking":
            raise InvalidField(
                f"'{where}' is not supported: the only option is 'enable_thinking'.", param=where, code="unsupported_parameter"
            )
        if not isinstance(value, bool):
            raise InvalidField(f"Invalid type for '{where}': expected a boolean.", param=where, code="invalid_type")
    if wire.reasoning_effort is not None:
        options["enable_thinking"] = wire.reasoning_effort != "none"
    if wire.enable_thinking is not None:
        options["enable_thinking"] = wire.enable_thinking
    return MappingProxyType(options)


def _thinking_fields(wire: schema.ChatRequest) -> tuple[str, ...]:
    """The fields that say whether the model is to think."""
    given = (
        ("reasoning_effort", wire.reasoning_effort is not None),
        ("enable_thinking", wire.enable_thinking is not None),
        ("chat_template_kwargs.enable_thinking", bool(without_nulls(wire.chat_template_kwargs or {}))),
    )
    return tuple(name for name, is_given in given if is_given)


def _unsupported(param: str, why: str) -> InvalidField:
    return InvalidField(f"This value of '{param}' is not supported: {why}.", param=param, code="unsupported_value")
