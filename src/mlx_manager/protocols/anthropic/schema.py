"""What an Anthropic client sends, and which of its fields do what. The published matrix is made from these tables."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from mlx_manager.core.requests import Effort
from mlx_manager.protocols.fields import Rule, Schema, honoured, noted, refused
from mlx_manager.protocols.sampling import SamplingFields

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]


class Other(BaseModel):
    """A block or a tool that is read by its type alone. Not a `Schema`: it is named as a whole, not field by field."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    type: str


def _by_type(*known: str) -> Callable[[object], str]:
    """The tag of a block: its type, or `other`. What has no type is one of the others, which miss it."""

    def tag(value: object) -> str:
        kind = cast(dict[str, object], value).get("type") if isinstance(value, dict) else None
        return kind if isinstance(kind, str) and kind in known else "other"

    return tag


def _text_or_array(value: object) -> str | None:
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else None


# What a value is says what it is meant to be, so that a mistake inside it is told of that kind alone.
_TEXT_OR_ARRAY = Discriminator(_text_or_array, custom_error_type="text_or_array_type", custom_error_message="neither text nor an array")
Text = Annotated[str, Tag("string")]


class Block(Schema):
    """`cache_control` is known everywhere and changes nothing anywhere: caching needs no marks, and what clients move from turn to turn
    must not reach the prompt."""

    cache_control: Any = None


class TextBlock(Block):
    type: Literal["text"]
    text: str


class ImageSource(Schema):
    """`file` is known to be refused by what it is."""

    type: Literal["base64", "url", "file"]
    media_type: str | None = None
    data: str | None = None
    url: str | None = None


class ImageBlock(Block):
    type: Literal["image"]
    source: ImageSource


TextOrImage = Annotated[
    Annotated[TextBlock, Tag("text")] | Annotated[ImageBlock, Tag("image")] | Annotated[Other, Tag("other")],
    Discriminator(_by_type("text", "image")),
]
TextOnly = Annotated[Annotated[TextBlock, Tag("text")] | Annotated[Other, Tag("other")], Discriminator(_by_type("text"))]


class DocumentSource(Schema):
    type: Literal["base64", "text", "content", "url", "file"]
    media_type: str | None = None
    data: str | None = None
    content: Annotated[Text | Annotated[list[TextOrImage], Tag("array")], _TEXT_OR_ARRAY] | None = None


class DocumentBlock(Block):
    type: Literal["document"]
    source: DocumentSource
    title: str | None = None
    context: str | None = None


class SearchResultBlock(Block):
    type: Literal["search_result"]
    source: str
    title: str
    content: list[TextOnly]


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any] | None = None


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ImageBlock, Tag("image")]
    | Annotated[DocumentBlock, Tag("document")]
    | Annotated[SearchResultBlock, Tag("search_result")]
    | Annotated[Other, Tag("other")],
    Discriminator(_by_type("text", "image", "document", "search_result")),
]


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[Text | Annotated[list[ResultBlock], Tag("array")], _TEXT_OR_ARRAY] | None = None
    is_error: bool | None = None


class ThinkingBlock(Block):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


ContentBlock = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ImageBlock, Tag("image")]
    | Annotated[DocumentBlock, Tag("document")]
    | Annotated[SearchResultBlock, Tag("search_result")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[Other, Tag("other")],
    Discriminator(_by_type("text", "image", "document", "search_result", "tool_use", "tool_result", "thinking")),
]


class Message(Schema):
    role: Literal["user", "assistant", "system"]
    content: Annotated[Text | Annotated[list[ContentBlock], Tag("array")], _TEXT_OR_ARRAY]


class CustomTool(Block):
    """`eager_input_streaming` asks for what is done anyway."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    input_examples: list[dict[str, Any]] | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None


class AnthropicTool(Other):
    """One that Anthropic defines or runs."""

    name: str | None = None


def _kind_of_tool(value: object) -> str:
    kind = cast(dict[str, object], value).get("type") if isinstance(value, dict) else None
    return "custom" if kind is None or kind == "custom" else "anthropic"


Tool = Annotated[
    Annotated[CustomTool, Tag("custom")] | Annotated[AnthropicTool, Tag("anthropic")],
    Discriminator(_kind_of_tool),
]


class ToolChoice(Schema):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Schema):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=1024)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Schema):
    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Schema):
    effort: Effort | None = None
    format: OutputFormat | None = None


class CountRequest(Schema):
    """What both endpoints take: all that the prompt is made of."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    system: Annotated[Text | Annotated[list[TextOnly], Tag("array")], _TEXT_OR_ARRAY] | None = None
    tools: Annotated[list[Tool], Field(max_length=256)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None
    mcp_servers: list[Any] | None = None


class MessagesRequest(CountRequest, SamplingFields):
    max_tokens: Annotated[int, Field(ge=0)]
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16)] | None = None
    stream: bool | None = None


_PROMPT: Mapping[str, Rule] = {
    "model": honoured("required; must be one of `GET /v1/models`; never downloads"),
    "messages": honoured(
        "1 to 4,096; `system` stays in place; an assistant's last is continued; thinking is taken back; blocks of no meaning here are "
        "named; documents that are text or PDFs with text in them; pictures in base64, or by `url` where the server is told to fetch"
    ),
    "system": honoured("text or text blocks; a billing header, which changes with every request, is left out"),
    "tools": honoured("up to 256; with `strict: true` arguments follow the schema to the letter; tools of Anthropic's own are named"),
    "tool_choice": honoured("`auto`, `any`, `tool`, `none`, enforced while decoding; `disable_parallel_tool_use` ends it after one call"),
    "thinking": honoured("`enabled` with `budget_tokens`, `disabled`, `adaptive`; absent: as the model likes; `display: omitted` seals it"),
    "output_config": honoured("`effort`: a template's level or a budget; `format`: `json_schema`, enforced after the reasoning"),
    "cache_control": honoured("caching needs no marks; wherever one stands, it never reaches the prompt"),
    "mcp_servers": honoured("`[]`; no server is called from here"),
    "context_management": noted("the client's history is taken as it is"),
    "diagnostics": noted("what was found again is told by `usage` alone"),
    "speed": noted("there is one speed"),
    "billing_policy": noted("nothing is billed"),
    "user_profile_id": noted("there are no profiles"),
    "workspace_id": noted("there are no workspaces"),
    "betas": noted("what is built needs no switch"),
    "compaction": refused("a conversation is not summarised here"),
    "api_base": refused("a request cannot choose where it is answered"),
    "api_key": refused("a request cannot choose where it is answered"),
    "chat_template": refused("templates come with the model only"),
    "priority": refused("priority follows from the key and the endpoint"),
}
_REPLY: Mapping[str, Rule] = {
    "max_tokens": honoured("required; 0 computes the prompt and says nothing; more than the context leaves is honoured by generating less"),
    "temperature": honoured("0 to 1; 0 is greedy; absent: the model's `generation_config.json`, else 1"),
    "top_p": honoured("0 to 1"),
    "top_k": honoured(">= 0; 0 is off"),
    "min_p": honoured("0 to 1, relative to the likeliest token (extension)"),
    "presence_penalty": honoured("-2 to 2, over the reply so far (extension)"),
    "frequency_penalty": honoured("-2 to 2, over the reply so far (extension)"),
    "repetition_penalty": honoured("above 0 to 2, over prompt and reply (extension)"),
    "seed": honoured("64-bit integer; the same draws in any batch (extension)"),
    "stop_sequences": honoured("up to 16 of up to 256 characters; found across tokens, never shown; not searched in thinking"),
    "stream": honoured(),
}

MESSAGE_FIELDS: Mapping[str, Rule] = {
    **_PROMPT,
    **_REPLY,
    "metadata": noted("kept for nothing until there is an audit log"),
    "service_tier": noted("there is one tier"),
    "inference_geo": noted("it is computed where the server stands"),
    "fallbacks": noted("no request is declined for another model to take"),
    "fallback_credit_token": noted("nothing is billed"),
    "container": refused("no code is run here"),
    "thread": refused("nothing is stored here: send the whole conversation"),
}

# A client may count the very body that it is about to send.
COUNT_FIELDS: Mapping[str, Rule] = {
    **_PROMPT,
    **{name: noted("only the prompt is counted") for name in (*_REPLY, "metadata", "service_tier")},
}
