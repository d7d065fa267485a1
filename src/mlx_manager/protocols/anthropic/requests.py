"""What an Anthropic client sends → what it wants."""

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar, cast

from mlx_manager.core import messages as core
from mlx_manager.core.errors import InvalidField
from mlx_manager.core.requests import (
    Conversation,
    GenerationRequest,
    JsonSchema,
    Reasoning,
    ReasoningOption,
    ToolChoice,
    ToolSpec,
)
from mlx_manager.protocols.anthropic import schema
from mlx_manager.protocols.checked import checked
from mlx_manager.protocols.fields import quoted
from mlx_manager.protocols.json_schema import check_schema
from mlx_manager.protocols.media import check_pictures, image_from_base64, image_from_url, written
from mlx_manager.protocols.sampling import sampling
from mlx_manager.protocols.seal import Seal
from mlx_manager.protocols.wire import Wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class AnthropicWanted(Wanted):
    """With `omits_thinking` reasoning goes out sealed, and not as text."""

    omits_thinking: bool = False


def read_messages(body: bytes, seal: Seal) -> AnthropicWanted:
    """`POST /v1/messages`. Raises `InvalidField`."""
    wire, ignored = checked(body, schema.MessagesRequest, schema.MESSAGE_FIELDS)
    if wire.thinking is not None and wire.thinking.budget_tokens is not None and wire.thinking.budget_tokens >= wire.max_tokens:
        raise InvalidField(
            f"Invalid 'thinking.budget_tokens': it must be less than 'max_tokens', which is {wire.max_tokens}.",
            param="thinking.budget_tokens",
        )
    wanted = _wanted(wire, ignored, seal)
    request = replace(
        wanted.request,
        sampling=sampling(wire),
        max_tokens=wire.max_tokens,
        stop=None if wire.stop_sequences is None else tuple(wire.stop_sequences),
    )
    return replace(wanted, request=request, stream=wire.stream is True)


def read_count_tokens(body: bytes, seal: Seal) -> AnthropicWanted:
    """`POST /v1/messages/count_tokens`: the prompt that `read_messages` makes of the same. Raises `InvalidField`."""
    wire, ignored = checked(body, schema.CountRequest, schema.COUNT_FIELDS)
    return _wanted(wire, ignored, seal)


def _wanted(wire: schema.CountRequest, ignored: tuple[str, ...], seal: Seal) -> AnthropicWanted:
    if wire.mcp_servers:
        raise InvalidField("'mcp_servers' must be empty: no server is called from here.", param="mcp_servers", code="unsupported_value")
    if wire.thinking is not None and wire.thinking.type == "enabled" and wire.thinking.budget_tokens is None:
        raise _missing("thinking.budget_tokens")
    history = _History(seal)
    messages = _joined([*history.system(wire.system), *(m for i, turn in enumerate(wire.messages) for m in history.turn(turn, i))])
    tools, dropped = _tools(wire.tools or [])
    continues, messages = _continued(messages, wire)
    if not messages:
        raise InvalidField("Invalid 'messages': there is nothing in them to answer.", param="messages")
    check_pictures(messages)
    conversation = Conversation(
        messages=tuple(messages),
        tools=tools,
        tool_choice=_tool_choice(wire.tool_choice, [t.name for t in tools], dropped),
        reasoning=_reasoning(wire),
        continues=continues,
        without_system=wire.system == [],
    )
    form = wire.output_config.format if wire.output_config is not None else None
    if form is not None:
        check_schema(form.json_schema, "output_config.format.schema")
    request = GenerationRequest(
        model=wire.model,
        prompts=(conversation,),
        output=None if form is None else JsonSchema(MappingProxyType(form.json_schema)),
        output_field="output_config.format.schema",
        parallel_tool_calls=wire.tool_choice is None or wire.tool_choice.disable_parallel_tool_use is not True,
    )
    without_effect = (*ignored, *(f"tools.{kind}" for kind in dropped.values()), *history.without_effect)
    return AnthropicWanted(
        request=request,
        stream=False,
        ignored=tuple(dict.fromkeys(without_effect)),
        reasoning_fields=_reasoning_fields(wire),
        omits_thinking=wire.thinking is not None and wire.thinking.display == "omitted",
    )


# ---- prefix stability: what a client changes with every request must not stand at the front of a prompt that is to be found again.
# Every backend that renders here wants this. One that passes requests on to Anthropic must send these texts as they came.

_BILLING_HEADER = "x-anthropic-billing-header:"
_TOKENS_LEFT = re.compile(r"<total_tokens>[\d,]+ tokens left</total_tokens>")


def without_billing_header(system: str) -> str:
    """A system text without its first line, if that is a header for Anthropic's accounts."""
    return system.partition("\n")[2] if system.startswith(_BILLING_HEADER) else system


def is_token_count(system: str) -> bool:
    """Whether a system text only says how many tokens the client counts as left."""
    return _TOKENS_LEFT.fullmatch(system.strip()) is not None


def _lasting(system: str) -> str | None:
    """What of a system text is the same in the next request; None if that is nothing."""
    if is_token_count(system):
        return None
    rest = without_billing_header(system)
    return None if rest == "" and system != "" else rest


# ---- what was said

# What tells a reader something of what Anthropic's servers found or ran; the rest is ciphertext and bookkeeping.
_TELLING = ("url", "title", "text", "content", "stdout", "stderr", "error_code", "tool_name", "file_id")
_TOLD_CHARS = 2000


class _History:
    """Turns → messages. Collects the names of what has no effect."""

    def __init__(self, seal: Seal) -> None:
        self._seal = seal
        self.without_effect: list[str] = []

    def system(self, system: str | Sequence[schema.TextBlock | schema.Other] | None) -> list[core.Message]:
        if system is None:
            return []
        texts = [system] if isinstance(system, str) else list(self._texts(system, "system"))
        return [core.Message("system", text) for given in texts if (text := _lasting(given)) is not None]

    def turn(self, wire: schema.Message, index: int) -> list[core.Message]:
        """Results of tools are messages of their own, in their places."""
        where = f"messages[{index}].content"
        match wire.role:
            case "system":
                return self._system_turn(wire.content, where)
            case "user":
                return self._user_turn(wire.content, where)
            case "assistant":
                return [self._assistant_turn(wire.content, where)]

    def _system_turn(self, content: str | Sequence[schema.ContentBlock], where: str) -> list[core.Message]:
        if isinstance(content, str):
            return self.system(content)
        texts = list[schema.TextBlock | schema.Other]()
        for i, block in enumerate(content):
            if not isinstance(block, schema.TextBlock | schema.Other):
                raise _misplaced(block, "system", f"{where}[{i}]")
            texts.append(block)
        return self.system(texts)

    def _user_turn(self, content: str | Sequence[schema.ContentBlock], where: str) -> list[core.Message]:
        if isinstance(content, str):
            return [core.Message("user", content)]
        messages = list[core.Message]()
        said = list[core.Part]()
        for i, block in enumerate(content):
            here = f"{where}[{i}]"
            match block:
                case schema.ToolResultBlock():
                    if core.content_of(said):
                        messages.append(core.Message("user", core.content_of(said)))
                    said = []
                    messages.append(core.Message("tool", self._result(block, here), tool_call_id=block.tool_use_id))
                case schema.ToolUseBlock() | schema.ThinkingBlock():
                    raise _misplaced(block, "user", here)
                case _:
                    said += self._parts(block, here)
        if core.content_of(said) or not messages:
            messages.append(core.Message("user", core.content_of(said)))
        return messages

    def _assistant_turn(self, content: str | Sequence[schema.ContentBlock], where: str) -> core.Message:
        if isinstance(content, str):
            return core.Message("assistant", content)
        said = list[core.Part]()
        thoughts = list[str]()
        calls = list[core.ToolCall]()
        for i, block in enumerate(content):
            match block:
                case schema.ThinkingBlock():
                    if thought := self._thought(block):
                        thoughts.append(thought)
                case schema.ToolUseBlock():
                    arguments = json.dumps(block.input or {}, ensure_ascii=False, separators=(",", ":"))
                    calls.append(core.ToolCall(block.id, block.name, arguments))
                case schema.ToolResultBlock() | schema.ImageBlock() | schema.DocumentBlock() | schema.SearchResultBlock():
                    raise _misplaced(block, "assistant", f"{where}[{i}]")
                case _:
                    said += self._parts(block, f"{where}[{i}]")
        reasoning = "\n\n".join(thoughts) if thoughts else None
        return core.Message("assistant", core.content_of(said), reasoning=reasoning, tool_calls=tuple(calls))

    def _thought(self, block: schema.ThinkingBlock) -> str | None:
        """The text of a thinking block that may be believed: others' signatures say nothing to us, ours must hold."""
        signature = block.signature or ""
        if not self._seal.is_ours(signature):
            thought = block.thinking or None
        elif block.thinking:
            thought = block.thinking if self._seal.verifies(signature, block.thinking) else None
        else:
            thought = self._seal.open(signature)
        if thought is None:
            self.without_effect.append("messages.content.thinking")
        return thought

    def _result(self, block: schema.ToolResultBlock, where: str) -> core.Content:
        said: list[core.Part] = ["Error: "] if block.is_error else []
        if isinstance(block.content, str):
            said.append(block.content)
        else:
            for i, inner in enumerate(block.content or []):
                said += self._parts(inner, f"{where}.content[{i}]")
        return core.content_of(said)

    def _parts(self, block: schema.ContentBlock, where: str) -> list[core.Part]:
        """What a block says, of those that any turn may hold or that nobody here knows."""
        match block:
            case schema.TextBlock():
                return [block.text]
            case schema.ImageBlock():
                return [_image(block.source, f"{where}.source")]
            case schema.DocumentBlock():
                return self._document(block, where)
            case schema.SearchResultBlock():
                return [f"{block.title}\n{block.source}\n", *self._texts(block.content, "messages.content.content"), "\n\n"]
            case schema.Other():
                return self._other(block, "messages.content")
            case _:
                raise AssertionError("blocks of one role only are read where their role is known")

    def _texts(self, blocks: Iterable[schema.TextBlock | schema.Other], path: str) -> Iterator[str]:
        for block in blocks:
            if isinstance(block, schema.TextBlock):
                yield block.text
            else:
                self.without_effect.append(f"{path}.{block.type}")

    def _other(self, block: schema.Other, path: str) -> list[core.Part]:
        """What Anthropic's servers did, in short; nothing for what is not known."""
        fields = block.model_extra or {}
        if block.type.endswith("tool_use"):
            told = f"{fields.get('name')} {json.dumps(fields.get('input'), ensure_ascii=False)}"
        elif block.type.endswith("_tool_result") or block.type in ("container_upload", "tool_reference"):
            told = " ".join(_told(fields))
        else:
            self.without_effect.append(f"{path}.{block.type}")
            return []
        return [f"[{block.type}: {told[:_TOLD_CHARS]}]\n"]

    def _document(self, block: schema.DocumentBlock, where: str) -> list[core.Part]:
        title = [f"{line}\n" for line in (block.title, block.context) if line]
        source, here = block.source, f"{where}.source"
        match source.type:
            case "text":
                return [*title, _required(source.data, f"{here}.data"), "\n\n"]
            case "base64":
                return [*title, _decoded(source, here), "\n\n"]
            case "content":
                content = _required(source.content, f"{here}.content")
                if isinstance(content, str):
                    return [*title, content, "\n\n"]
                inner = [part for i, b in enumerate(content) for part in self._parts(b, f"{here}.content[{i}]")]
                return [*title, *inner, "\n\n"]
            case "url" | "file":
                raise _elsewhere("a document", here)


def _told(value: object) -> Iterator[str]:
    match value:
        case dict():
            for key, inner in cast(dict[str, object], value).items():
                if not isinstance(inner, str):
                    yield from _told(inner)
                elif key in _TELLING:
                    yield inner
        case list():
            for inner in cast(list[object], value):
                yield from _told(inner)
        case _:
            pass


def _joined(messages: Iterable[core.Message]) -> list[core.Message]:
    """Neighbours of one role are one turn; each result of a tool stays one."""
    joined = list[core.Message]()
    for message in messages:
        if joined and joined[-1].role == message.role != "tool":
            joined[-1] = _one_turn(joined[-1], message)
        else:
            joined.append(message)
    return joined


def _one_turn(first: core.Message, then: core.Message) -> core.Message:
    """An assistant's goes on where it stopped, which is how a reply to a beginning comes back; others' are paragraphs."""
    gap = "\n\n" if first.role != "assistant" and first.content and then.content else ""
    thoughts = [thought for thought in (first.reasoning, then.reasoning) if thought is not None]
    return core.Message(
        first.role,
        core.content_of([*_in_parts(first.content), gap, *_in_parts(then.content)]),
        reasoning="\n\n".join(thoughts) if thoughts else None,
        tool_calls=(*first.tool_calls, *then.tool_calls),
    )


def _in_parts(content: core.Content) -> tuple[core.Part, ...]:
    return (content,) if isinstance(content, str) else content


def _continued(messages: list[core.Message], wire: schema.CountRequest) -> tuple[bool, list[core.Message]]:
    """Whether the reply goes on with the last message, and the messages; the empty beginning of a reply is none."""
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant":
        return False, messages
    if not last.content and not last.reasoning and not last.tool_calls:
        return False, messages[:-1]
    where = f"messages[{max(i for i, turn in enumerate(wire.messages) if turn.role == 'assistant')}]"
    if last.tool_calls:
        raise InvalidField(f"'{where}' calls a tool: a 'tool_result' must follow.", param=where)
    if not last.content:
        raise InvalidField(f"'{where}' has no text to go on with.", param=where)
    if wire.thinking is not None and wire.thinking.type != "disabled":
        raise InvalidField(
            f"'{where}' is the assistant's: a reply that goes on with it cannot begin with thinking. End with a user message, or disable "
            "'thinking'.",
            param=where,
        )
    return True, messages


def _image(source: schema.ImageSource, where: str) -> core.Media:
    if source.type == "file":
        raise _elsewhere("a picture", where)
    if source.type == "url":
        return image_from_url(_required(source.url, f"{where}.url"), f"{where}.url")
    return image_from_base64(_required(source.data, f"{where}.data"), _required(source.media_type, f"{where}.media_type"), where)


def _decoded(source: schema.DocumentSource, where: str) -> str | core.Document:
    kind = f" of type {quoted(source.media_type)}" if source.media_type else ""
    try:
        data = base64.b64decode(re.sub(r"\s", "", _required(source.data, f"{where}.data")), validate=True)
        return written(data, f"{where}.data")
    except (binascii.Error, ValueError):
        raise InvalidField(
            f"Invalid '{where}.data': only text and PDFs can be read, and this document{kind} is neither.",
            param=f"{where}.data",
            code="unsupported_value",
        ) from None


T = TypeVar("T")


def _required(value: T | None, param: str) -> T:
    if value is None:
        raise _missing(param)
    return value


def _missing(param: str) -> InvalidField:
    return InvalidField(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def _elsewhere(what: str, where: str) -> InvalidField:
    message = f"Invalid '{where}.type': {what} must be in the request itself; this server fetches and stores none."
    return InvalidField(message, param=f"{where}.type", code="unsupported_value")


def _misplaced(block: schema.ContentBlock, role: str, where: str) -> InvalidField:
    return InvalidField(f"Invalid '{where}.type': a {role} message cannot hold a block of type '{block.type}'.", param=f"{where}.type")


# ---- what may be called, and how much is thought


def _tools(tools: Sequence[schema.CustomTool | schema.AnthropicTool]) -> tuple[tuple[ToolSpec, ...], Mapping[str, str]]:
    """The tools that are offered, and the types of those that are not, by name."""
    offered = list[ToolSpec]()
    dropped = dict[str, str]()
    for i, tool in enumerate(tools):
        match tool:
            case schema.AnthropicTool():
                dropped[tool.type if tool.name is None else tool.name] = tool.type
            case schema.CustomTool():
                if any(tool.name == other.name for other in offered):
                    raise InvalidField(f"Two tools are named '{tool.name}': every tool needs a name of its own.", param=f"tools[{i}].name")
                parameters = MappingProxyType(tool.input_schema or {})
                check_schema(parameters, f"tools[{i}].input_schema", strict=tool.strict is True)
                offered.append(ToolSpec(tool.name, _description(tool), parameters, strict=tool.strict is True))
    return tuple(offered), dropped


def _description(tool: schema.CustomTool) -> str | None:
    if not tool.input_examples:
        return tool.description
    examples = "\n".join(json.dumps(example, ensure_ascii=False) for example in tool.input_examples)
    return "\n\n".join(text for text in (tool.description, f"Examples of input:\n{examples}") if text)


def _tool_choice(wire: schema.ToolChoice | None, names: Sequence[str], dropped: Mapping[str, str]) -> ToolChoice:
    """Raises `InvalidField` for a call that has to be made and cannot."""
    match None if wire is None else wire.type:
        case None | "auto":
            return ToolChoice()
        case "none":
            return ToolChoice("none")
        case "any":
            if not names:
                raise InvalidField("Invalid value for 'tool_choice': there are no 'tools' to call.", param="tool_choice")
            return ToolChoice("required")
        case "tool":
            assert wire is not None
            name = _required(wire.name, "tool_choice.name")
            if name in names:
                return ToolChoice("required", (name,))
            why = f"there is no tool named {quoted(name)} in 'tools'"
            if name in dropped:
                why = f"{quoted(name)} is of type {quoted(dropped[name])}, and only custom tools are offered here"
            raise InvalidField(f"Invalid value for 'tool_choice.name': {why}.", param="tool_choice.name")


def _reasoning(wire: schema.CountRequest) -> Reasoning:
    return Reasoning(
        enabled=None if wire.thinking is None else wire.thinking.type != "disabled",
        effort=None if wire.output_config is None else wire.output_config.effort,
        budget=None if wire.thinking is None else wire.thinking.budget_tokens,
    )


def _reasoning_fields(wire: schema.CountRequest) -> Mapping[ReasoningOption, tuple[str, ...]]:
    """The fields that said something of reasoning."""
    names: Mapping[ReasoningOption, str] = {"enabled": "thinking", "effort": "output_config.effort", "budget": "thinking.budget_tokens"}
    return MappingProxyType({option: (names[option],) for option in _reasoning(wire).given})
