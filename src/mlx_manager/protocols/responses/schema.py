"""What a client of the Responses API sends, and which of its fields do what. The published matrix is made from this table."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter

from mlx_manager.core.requests import Effort
from mlx_manager.protocols.fields import Rule, Schema, honoured, noted, refused
from mlx_manager.protocols.sampling import BiasedSamplingFields

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stage = Literal["in_progress", "completed", "incomplete"]


def _type_of(value: object) -> str | None:
    """The `type` of a wire object. None where there is none, or it is no object."""
    if not isinstance(value, dict):
        return None
    kind = cast(dict[str, object], value).get("type")
    return kind if isinstance(kind, str) else None


# ---- parts of a message or of a result


PartType = Literal["input_text", "output_text", "text", "refusal", "input_image", "input_file", "input_audio"]


class Part(Schema):
    type: PartType
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    detail: str | None = None
    file_id: str | None = None
    file_data: str | None = None
    file_url: str | None = None
    filename: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class OtherPart(Schema):
    """One that no model here could read."""

    model_config = ConfigDict(extra="ignore")

    type: str


def _kind_of_part(value: object) -> str:
    kind = _type_of(value)
    return "part" if kind is None or kind in get_args(PartType) else "other part"


AnyPart = Annotated[Annotated[Part, Tag("part")] | Annotated[OtherPart, Tag("other part")], Discriminator(_kind_of_part)]
Content = str | Annotated[list[AnyPart], Field(max_length=1024)]


# ---- tools


class FunctionTool(Schema):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class InputFormat(Schema):
    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: Annotated[str, Field(min_length=1, max_length=64 << 10)] | None = None


class CustomTool(Schema):
    type: Literal["custom"]
    name: Name
    description: str | None = None
    format: InputFormat | None = None


class OtherTool(Schema):
    """One that is run elsewhere, or that no model here could call."""

    model_config = ConfigDict(extra="ignore")

    type: str


# The names of the kinds are no keys of a tool: a path into a body has none of them.
_KINDS_OF_TOOL = {"function": "function tool", "custom": "custom tool", "namespace": "namespace tool"}


def _kind_of_tool(value: object) -> str:
    kind = _type_of(value)
    return "function tool" if kind is None else _KINDS_OF_TOOL.get(kind, "other tool")


def _kind_of_inner_tool(value: object) -> str:
    kind = _kind_of_tool(value)
    return "other tool" if kind == "namespace tool" else kind


_Callable = Annotated[FunctionTool, Tag("function tool")] | Annotated[CustomTool, Tag("custom tool")]
InnerTool = Annotated[_Callable | Annotated[OtherTool, Tag("other tool")], Discriminator(_kind_of_inner_tool)]


class NamespaceTool(Schema):
    type: Literal["namespace"]
    name: Name
    description: str | None = None
    tools: Annotated[list[InnerTool], Field(max_length=256)]


Tool = Annotated[
    _Callable | Annotated[NamespaceTool, Tag("namespace tool")] | Annotated[OtherTool, Tag("other tool")],
    Discriminator(_kind_of_tool),
]
Tools = Annotated[list[Tool], Field(max_length=256)]


# ---- items of the input


class Message(Schema):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: Stage | None = None
    phase: str | None = None


class Reasoning(Schema):
    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None
    status: Stage | None = None


class FunctionCall(Schema):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None
    id: str | None = None
    status: Stage | None = None


class CustomCall(Schema):
    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str
    namespace: str | None = None
    id: str | None = None
    status: Stage | None = None


class CallOutput(Schema):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: Content
    name: str | None = None
    namespace: str | None = None
    id: str | None = None
    status: Stage | None = None


class ShellCall(Schema):
    """A call of a tool that the client runs: what is to be done is an object of its own."""

    type: Literal["local_shell_call", "shell_call", "apply_patch_call"]
    call_id: str
    action: dict[str, Any] | None = None
    operation: dict[str, Any] | None = None
    id: str | None = None
    status: Stage | None = None


class ShellCallOutput(Schema):
    """`local_shell_call_output` may name the call by `id`."""

    type: Literal["local_shell_call_output", "shell_call_output", "apply_patch_call_output"]
    call_id: str | None = None
    output: str | list[Any] | None = None
    id: str | None = None
    status: str | None = None


class ItemReference(Schema):
    type: Literal["item_reference"] | None = None
    id: str


class MoreTools(Schema):
    type: Literal["additional_tools", "tool_search_output"]
    tools: Tools
    role: str | None = None
    call_id: str | None = None
    execution: str | None = None
    id: str | None = None
    status: Stage | None = None


class ToolSearchCall(Schema):
    type: Literal["tool_search_call"]
    arguments: Any = None
    call_id: str | None = None
    execution: str | None = None
    id: str | None = None
    status: Stage | None = None


class OtherItem(Schema):
    """One that is rendered as nothing."""

    model_config = ConfigDict(extra="ignore")

    type: str


_KINDS_OF_ITEM = {
    "message": "message item",
    "reasoning": "reasoning item",
    "function_call": "function call item",
    "custom_tool_call": "custom call item",
    "function_call_output": "output item",
    "custom_tool_call_output": "output item",
    "local_shell_call": "shell item",
    "shell_call": "shell item",
    "apply_patch_call": "shell item",
    "local_shell_call_output": "shell output item",
    "shell_call_output": "shell output item",
    "apply_patch_call_output": "shell output item",
    "item_reference": "reference item",
    "additional_tools": "tools item",
    "tool_search_output": "tools item",
    "tool_search_call": "search item",
}


def _kind_of_item(value: object) -> str:
    kind = _type_of(value)
    if kind is not None:
        return _KINDS_OF_ITEM.get(kind, "other item")
    is_reference = isinstance(value, dict) and "id" in value and "role" not in value and "content" not in value
    return "reference item" if is_reference else "message item"


Item = Annotated[
    Annotated[Message, Tag("message item")]
    | Annotated[Reasoning, Tag("reasoning item")]
    | Annotated[FunctionCall, Tag("function call item")]
    | Annotated[CustomCall, Tag("custom call item")]
    | Annotated[CallOutput, Tag("output item")]
    | Annotated[ShellCall, Tag("shell item")]
    | Annotated[ShellCallOutput, Tag("shell output item")]
    | Annotated[ItemReference, Tag("reference item")]
    | Annotated[MoreTools, Tag("tools item")]
    | Annotated[ToolSearchCall, Tag("search item")]
    | Annotated[OtherItem, Tag("other item")],
    Discriminator(_kind_of_item),
]
ITEM: TypeAdapter[Item] = TypeAdapter(Item)


# ---- the request


class StreamOptions(Schema):
    pass


class ReasoningOptions(Schema):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(Schema):
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Schema):
    format: TextFormat | None = None


Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)]


class ResponsesRequest(BiasedSamplingFields):
    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: str | Annotated[list[Item], Field(max_length=16384)] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    enable_thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = (
        None
    )
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None


RESPONSES_FIELDS: Mapping[str, Rule] = {
    "model": honoured("required; must be one of `GET /v1/models`; never downloads"),
    "input": honoured(
        "text or up to 16,384 items: messages, reasoning, calls of functions and custom tools, of shells and patches, their outputs, "
        "`item_reference`, `additional_tools`; other items are rendered as nothing and named, `compaction_trigger` is refused; "
        "files that are text or PDFs with text in them; pictures by `image_url` (`https` only where the server is told to fetch)"
    ),
    "instructions": honoured("the first system message; not inherited through `previous_response_id`"),
    "previous_response_id": honoured("of a response that is still kept: 1,024 for each client, 64 MiB, one hour, none after a restart"),
    "store": honoured("false keeps nothing; true, or absent, keeps the response in memory as said above"),
    "stream": honoured(),
    "stream_options": honoured("only with `stream`; `include_obfuscation` has no effect"),
    "max_output_tokens": honoured(">= 1; more than the context leaves is honoured by generating less"),
    "temperature": honoured("0 to 2; 0 is greedy; absent: the model's `generation_config.json`, else 1"),
    "top_p": honoured("0 to 1"),
    "top_k": honoured(">= 0; 0 is off (extension)"),
    "min_p": honoured("0 to 1, relative to the likeliest token (extension)"),
    "presence_penalty": honoured("-2 to 2, over the reply so far (extension)"),
    "frequency_penalty": honoured("-2 to 2, over the reply so far (extension)"),
    "repetition_penalty": honoured("above 0 to 2, over prompt and reply (extension)"),
    "seed": honoured("64-bit integer; the same draws in any batch (extension)"),
    "stop": honoured("string or up to 16 strings of up to 256 characters; found across tokens, never shown (extension)"),
    "logit_bias": honoured("up to 1,024 token ids, -100 to 100 (extension)"),
    "tools": honoured(
        "up to 256: `function`, `custom`, `namespace`; the `regex` of a custom tool is enforced, its `lark` where calls hold plain text, "
        "and it is named in any case; tools that are run elsewhere are dropped and named"
    ),
    "tool_choice": honoured("`none`, `auto`, `required`, a function or custom tool by name, `allowed_tools`; enforced while decoding"),
    "parallel_tool_calls": honoured("false ends the reply after the first call"),
    "text": honoured("`format`: `text`, `json_object`, `json_schema`, enforced while decoding; `verbosity` has no effect"),
    "reasoning": honoured(
        "`effort`: `none` is no reasoning, else the template's own level or a budget; `summary`: the reasoning comes as a summary, "
        "not as raw text; `context` and `mode` have no effect"
    ),
    "enable_thinking": honoured("the template's switch; named as ignored where it has none (extension)"),
    "thinking_budget": honoured("tokens of reasoning after which the answer begins; ignored by models that do not reason (extension)"),
    "include": honoured("`message.output_text.logprobs`; `reasoning.encrypted_content` is there in any case; other values are named"),
    "top_logprobs": honoured("0 to 20; only with `message.output_text.logprobs` in `include`"),
    "truncation": honoured("`disabled`; `auto` is refused: no input is cut in silence"),
    "background": honoured("false; true is refused: a response is made while its client waits"),
    "metadata": honoured("given back: up to 16 texts of up to 512 characters"),
    "user": honoured("given back"),
    "safety_identifier": honoured("given back"),
    "max_tool_calls": noted("no tool is run here"),
    "client_metadata": noted("kept for nothing until there is an audit log"),
    "service_tier": noted("there is one tier"),
    "prompt_cache_key": noted("a hint that is not needed"),
    "prompt_cache_options": noted("a hint that is not needed"),
    "prompt_cache_retention": noted("a hint that is not needed"),
    "background_options": noted("nothing runs in the background"),
    "image": noted("pictures are not compressed"),
    "access_programs": noted("there are none"),
    "personality": noted("models here have no such setting"),
    "conversation": refused("use `previous_response_id` or send the items"),
    "prompt": refused("no prompts are stored here: send `instructions` and `input`"),
    "context_management": refused("nothing is compacted here"),
    "moderation": refused("nothing is moderated here"),
    "max_tokens": refused("use `max_output_tokens`"),
    "max_completion_tokens": refused("use `max_output_tokens`"),
    "response_format": refused("use `text.format`"),
    "structured_outputs": refused("use `text.format`"),
    "guided_json": refused("use `text.format`"),
    "guided_regex": refused("use `text.format`"),
    "guided_choice": refused("use `text.format`"),
    "guided_grammar": refused("use `text.format`"),
    "reasoning_effort": refused("use `reasoning.effort`"),
    "chat_template_kwargs": refused("use `reasoning.effort`, `enable_thinking` or `thinking_budget`"),
    "chat_template": refused("templates come with the model only"),
    "n": refused("a response is one reply"),
    "api_base": refused("a request cannot choose where it is answered"),
    "api_key": refused("a request cannot choose where it is answered"),
    "priority": refused("priority follows from the key and the endpoint"),
}
