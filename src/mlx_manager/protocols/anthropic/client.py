"""What is wanted → what an Anthropic client sends: the other direction of `requests`, for servers that speak messages."""

import base64
import json
from typing import Any

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Content, Document, Image, Message, Part, RemoteImage, Video
from mlx_manager.core.requests import Conversation, GenerationRequest, JsonSchema, OutputFormat, Reasoning, ToolChoice, ToolSpec
from mlx_manager.protocols.media import image_type
from mlx_manager.protocols.sampling import sampling_fields
from mlx_manager.protocols.wire import Json, without_absent

# Required there; what is asked for where the client did not say.
_MAX_TOKENS = 4096


def write_messages(request: GenerationRequest) -> Json:
    """The body of `POST /v1/messages`, without `stream`. The request has one conversation and wants one reply. Raises `InvalidField` for a
    form of the answer that this protocol has no word for."""
    (conversation,) = request.prompts
    assert isinstance(conversation, Conversation)
    fields: Json = {
        "model": request.model,
        "messages": [_turn(message) for message in conversation.messages],
        "max_tokens": _MAX_TOKENS if request.max_tokens is None else request.max_tokens,
        "stop_sequences": None if request.stop is None else list(request.stop),
        "tools": [_tool(tool) for tool in conversation.tools] or None,
        "tool_choice": _tool_choice(conversation.tool_choice, parallel=request.parallel_tool_calls) if conversation.tools else None,
        "thinking": _thinking(conversation.reasoning),
        "output_config": _output_config(conversation.reasoning, request.output) or None,
    }
    sampling = sampling_fields(request.sampling)
    sampling.pop("logit_bias", None)
    return without_absent(fields | sampling)


def _turn(message: Message) -> Json:
    if message.role == "tool":
        block = {"type": "tool_result", "tool_use_id": message.tool_call_id, "content": _content(message.content)}
        return {"role": "user", "content": [block]}
    if message.role != "assistant":
        return {"role": message.role, "content": _content(message.content)}
    thinking: list[Json] = [] if message.reasoning is None else [{"type": "thinking", "thinking": message.reasoning}]
    said = [{"type": "text", "text": message.text}] if message.text else []
    calls = [{"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)} for call in message.tool_calls]
    return {"role": "assistant", "content": [*thinking, *said, *calls]}


def _input(arguments: str) -> Any:
    try:
        value: Any = json.loads(arguments)
    except ValueError:
        return {"arguments": arguments}  # what is no object cannot be said otherwise
    return value if isinstance(value, dict) else {"arguments": arguments}  # pyright: ignore[reportUnknownVariableType]


def _content(content: Content) -> str | list[Json]:
    return content if isinstance(content, str) else [_block(part) for part in content]


def _block(part: Part) -> Json:
    match part:
        case str():
            return {"type": "text", "text": part}
        case Image(data):
            return {"type": "image", "source": {"type": "base64", "media_type": image_type(part), "data": base64.b64encode(data).decode()}}
        case RemoteImage(url):
            return {"type": "image", "source": {"type": "url", "url": url}}
        case Video():
            raise InvalidField("Anthropic's messages have no videos.", param=part.where, code="unsupported_value")
        case Document(data):
            source = {"type": "base64", "media_type": "application/pdf", "data": base64.b64encode(data).decode()}
            return {"type": "document", "source": source}


def _tool(tool: ToolSpec) -> Json:
    fields: Json = {"name": tool.name, "description": tool.description, "input_schema": dict(tool.parameters)}
    return without_absent(fields | ({"strict": True} if tool.strict else {}))


def _tool_choice(choice: ToolChoice, *, parallel: bool) -> Json:
    names = choice.names or ()
    one_by_one = {} if parallel or choice.mode == "none" else {"disable_parallel_tool_use": True}
    match choice.mode:
        case "required" if len(names) == 1:
            return {"type": "tool", "name": names[0], **one_by_one}
        case "required":
            return {"type": "any", **one_by_one}
        case _:
            return {"type": choice.mode, **one_by_one}


def _thinking(wanted: Reasoning) -> Json | None:
    if wanted.enabled is False:
        return {"type": "disabled"}
    if wanted.budget is not None:
        return {"type": "enabled", "budget_tokens": wanted.budget}
    return {"type": "adaptive"} if wanted.enabled else None


def _output_config(wanted: Reasoning, output: OutputFormat | None) -> Json:
    config: Json = {} if wanted.effort is None else {"effort": wanted.effort}
    match output:
        case None:
            return config
        case JsonSchema(schema):
            return {**config, "format": {"type": "json_schema", "schema": schema}}
        case _:
            raise InvalidField("Anthropic's messages know no form but a JSON Schema.", param="response_format", code="unsupported_value")
