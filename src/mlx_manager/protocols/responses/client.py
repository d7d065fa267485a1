"""What is wanted → what a client of the Responses API sends: the other direction of `requests`."""

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Content, Document, Image, Message, Part, RemoteImage, Video
from mlx_manager.core.requests import AnyJson, Conversation, GenerationRequest, JsonSchema, OutputFormat, Reasoning, ToolChoice, ToolSpec
from mlx_manager.protocols.media import data_url, pdf_file
from mlx_manager.protocols.sampling import sampling_fields
from mlx_manager.protocols.wire import Json, without_absent


def write_responses(request: GenerationRequest) -> Json:
    """The body of `POST /v1/responses`, without `stream`; nothing is to be stored. The request has one conversation and wants one reply.
    Raises `InvalidField` for a form of the answer that this protocol has no word for."""
    (conversation,) = request.prompts
    assert isinstance(conversation, Conversation)
    fields: Json = {
        "model": request.model,
        "input": [item for message in conversation.messages for item in _items(message)],
        "store": False,
        "max_output_tokens": request.max_tokens,
        "stop": None if request.stop is None else list(request.stop),
        "include": None if request.num_top_logprobs is None else ["message.output_text.logprobs"],
        "top_logprobs": request.num_top_logprobs or None,
        "parallel_tool_calls": None if request.parallel_tool_calls else False,
        "tools": [_tool(tool) for tool in conversation.tools] or None,
        "tool_choice": _tool_choice(conversation.tool_choice) if conversation.tools else None,
        "text": _text(request.output),
        **_reasoning(conversation.reasoning),
    }
    return without_absent(fields | sampling_fields(request.sampling))


def _items(message: Message) -> list[Json]:
    match message.role:
        case "tool":
            return [{"type": "function_call_output", "call_id": message.tool_call_id, "output": _content(message.content)}]
        case "assistant":
            thought: list[Json] = []
            if message.reasoning is not None:
                text = {"type": "reasoning_text", "text": message.reasoning}
                thought = [{"type": "reasoning", "id": "rs_0", "summary": [], "content": [text]}]
            part = {"type": "output_text", "text": message.text, "annotations": list[str]()}
            said = [{"role": "assistant", "content": [part]}] if message.text or not message.tool_calls else []
            calls = [{"type": "function_call", "call_id": c.id, "name": c.name, "arguments": c.arguments} for c in message.tool_calls]
            return [*thought, *said, *calls]
        case role:
            return [{"role": role, "content": _content(message.content)}]


def _content(content: Content) -> str | list[Json]:
    return content if isinstance(content, str) else [_part(part) for part in content]


def _part(part: Part) -> Json:
    match part:
        case str():
            return {"type": "input_text", "text": part}
        case Image():
            return {"type": "input_image", "image_url": data_url(part), "detail": "auto"}
        case RemoteImage(url):
            return {"type": "input_image", "image_url": url, "detail": "auto"}
        case Video():
            raise InvalidField("The Responses API has no videos.", param=part.where, code="unsupported_value")
        case Document():
            return {"type": "input_file", **pdf_file(part)}


def _tool(tool: ToolSpec) -> Json:
    fields: Json = {"type": "function", "name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return without_absent(fields) | {"strict": tool.strict}


def _tool_choice(choice: ToolChoice) -> str | Json | None:
    named = [{"type": "function", "name": name} for name in choice.names or ()]
    if choice.mode == "required" and len(named) == 1:
        return named[0]
    if choice.names is not None and choice.mode != "none":
        return {"type": "allowed_tools", "mode": choice.mode, "tools": named}
    return None if choice.mode == "auto" else choice.mode


def _reasoning(wanted: Reasoning) -> Json:
    return {
        "reasoning": None if wanted.effort is None else {"effort": wanted.effort},
        "enable_thinking": wanted.enabled,
        "thinking_budget": wanted.budget,
    }


def _text(output: OutputFormat | None) -> Json | None:
    match output:
        case None:
            return None
        case AnyJson():
            return {"format": {"type": "json_object"}}
        case JsonSchema(schema, strict):
            return {"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": strict}}
        case _:
            raise InvalidField("The Responses API knows no form but JSON.", param="response_format", code="unsupported_value")
