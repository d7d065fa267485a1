"""What is wanted → what an OpenAI client sends: the other direction of `requests`, for servers that speak chat completions."""

import base64

from mlx_manager.core.messages import Content, Document, Image, Message, Part, RemoteImage, ToolCall, Video
from mlx_manager.core.requests import (
    AnyJson,
    Conversation,
    GenerationRequest,
    Grammar,
    JsonSchema,
    OneOf,
    OutputFormat,
    Reasoning,
    Regex,
    ToolChoice,
    ToolSpec,
)
from mlx_manager.protocols.media import data_url, pdf_file
from mlx_manager.protocols.sampling import sampling_fields
from mlx_manager.protocols.wire import Json, without_absent


def write_chat(request: GenerationRequest) -> Json:
    """The body of `POST /v1/chat/completions`, without `stream`. The request has one conversation; a reply cannot be made to go on with
    the assistant's last message here."""
    (conversation,) = request.prompts
    assert isinstance(conversation, Conversation)
    fields: Json = {
        "model": request.model,
        "messages": [_message(message) for message in conversation.messages],
        "max_completion_tokens": request.max_tokens,
        "stop": None if request.stop is None else list(request.stop),
        "n": request.num_replies if request.num_replies != 1 else None,
        "logprobs": True if request.num_top_logprobs is not None else None,
        "top_logprobs": request.num_top_logprobs or None,
        "parallel_tool_calls": None if request.parallel_tool_calls else False,
        "tools": [_tool(tool) for tool in conversation.tools] or None,
        "tool_choice": _tool_choice(conversation.tool_choice) if conversation.tools else None,
    }
    return without_absent(fields | sampling_fields(request.sampling) | _reasoning(conversation.reasoning) | _form(request.output))


def _message(message: Message) -> Json:
    fields: Json = {
        "role": message.role,
        "content": _content(message.content),
        "name": message.name,
        "reasoning_content": message.reasoning,
        "tool_calls": [_call(call) for call in message.tool_calls] or None,
        "tool_call_id": message.tool_call_id,
    }
    return without_absent(fields)


def _content(content: Content) -> str | list[Json]:
    return content if isinstance(content, str) else [_part(part) for part in content]


def _part(part: Part) -> Json:
    match part:
        case str():
            return {"type": "text", "text": part}
        case Image():
            return {"type": "image_url", "image_url": {"url": data_url(part)}}
        case RemoteImage(url):
            return {"type": "image_url", "image_url": {"url": url}}
        case Video(data, num_frames):
            url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
            return {"type": "video_url", "video_url": {"url": url, "num_frames": num_frames}}
        case Document():
            return {"type": "file", "file": pdf_file(part)}


def _call(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _tool(tool: ToolSpec) -> Json:
    function: Json = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": without_absent(function | ({"strict": True} if tool.strict else {}))}


def _tool_choice(choice: ToolChoice) -> str | Json | None:
    named = [{"type": "function", "function": {"name": name}} for name in choice.names or ()]
    if choice.mode == "required" and len(named) == 1:
        return named[0]
    if choice.names is not None and choice.mode != "none":
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": named}}
    return None if choice.mode == "auto" else choice.mode


def _reasoning(wanted: Reasoning) -> Json:
    return {"enable_thinking": wanted.enabled, "reasoning_effort": wanted.effort, "thinking_budget": wanted.budget}


def _form(output: OutputFormat | None) -> Json:
    match output:
        case None:
            return {}
        case AnyJson():
            return {"response_format": {"type": "json_object"}}
        case JsonSchema(schema, strict):
            named = {"name": "answer", "schema": schema, "strict": strict}
            return {"response_format": {"type": "json_schema", "json_schema": named}}
        case Regex(pattern):
            return {"structured_outputs": {"regex": pattern}}
        case OneOf(texts):
            return {"structured_outputs": {"choice": list(texts)}}
        case Grammar(lark):
            return {"structured_outputs": {"grammar": lark}}
