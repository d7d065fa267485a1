"""What an OpenAI client sends, and which of its fields do what. The published matrix is made from these tables."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, Field, Tag, model_validator

from mlx_manager.core.requests import Effort, ReasoningOption
from mlx_manager.protocols.fields import Rule, Schema, honoured, noted, refused
from mlx_manager.protocols.sampling import BiasedSamplingFields

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


Pattern = Annotated[str, Field(min_length=1, max_length=4 << 10)]
Lark = Annotated[str, Field(min_length=1, max_length=64 << 10)]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1024)]


class StructuredOutputs(Schema):
    """One of them."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Lark | None = None


class StreamOptions(Schema):
    include_usage: bool | None = None


class Generation(BiasedSamplingFields):
    """The fields that both endpoints share."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Lark | None = None


class ImageUrl(Schema):
    url: str
    detail: str | None = None


class VideoUrl(Schema):
    """`num_frames` are looked at, spread evenly over the clip."""

    url: str
    num_frames: Annotated[int, Field(ge=1, le=32)] | None = None


class Part(Schema):
    """What is said, by its type. `input_audio` is known to be refused by what it is."""

    type: Literal["text", "refusal", "image_url", "video_url", "input_audio", "file"]
    text: str | None = None
    refusal: str | None = None
    image_url: ImageUrl | None = None
    video_url: VideoUrl | None = None
    file: dict[str, Any] | None = None


class FunctionCall(Schema):
    name: str
    arguments: str | None = None


class CustomCall(Schema):
    name: str
    input: str


class ToolCall(Schema):
    """What is called, by its type."""

    id: str
    type: Literal["function", "custom"] | None = None
    function: FunctionCall | None = None
    custom: CustomCall | None = None


class Message(Schema):
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(max_length=256)] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_annotations(cls, value: Any) -> Any:
        """Every reply has them, and comes back with the history: only those that say something are worth a name."""
        if not isinstance(value, dict):
            return value
        fields = cast(dict[str, Any], value)
        return {k: v for k, v in fields.items() if (k, v) != ("annotations", [])}


class Function(Schema):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class CustomGrammar(Schema):
    syntax: Literal["lark", "regex"]
    definition: Lark


class CustomFormat(Schema):
    type: Literal["text", "grammar"]
    grammar: CustomGrammar | None = None


class Custom(Schema):
    name: Name
    description: str | None = None
    format: CustomFormat | None = None


class Tool(Schema):
    """What may be called, by its type."""

    type: Literal["function", "custom"]
    function: Function | None = None
    custom: Custom | None = None


class NamedSchema(Schema):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Schema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class ReasoningOptions(Schema):
    """What a chat template may be told."""

    enable_thinking: bool | None = None
    reasoning_effort: Effort | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None


OPTION_FIELDS: Mapping[ReasoningOption, str] = {"enabled": "enable_thinking", "effort": "reasoning_effort", "budget": "thinking_budget"}


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=256)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: bool | None = None
    modalities: list[str] | None = None


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def kind_of_prompt(value: object) -> str | None:
    """What the first item is says what all are meant to be, so that a mistake is told of that kind alone."""
    if not isinstance(value, list):
        return "text" if isinstance(value, str) else None
    first: object = next(iter(cast(list[object], value)), None)
    return "tokens" if isinstance(first, int) else "token lists" if isinstance(first, list) else "texts"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[TokenIds, Tag("tokens")]
    | Annotated[list[str], Field(min_length=1, max_length=128), Tag("texts")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=128), Tag("token lists")],
    Discriminator(kind_of_prompt, custom_error_type="text_or_array_type", custom_error_message="neither text nor an array"),
]


class CompletionRequest(Generation):
    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: int | None = None


_SAMPLING: Mapping[str, Rule] = {
    "model": honoured("required; must be one of `GET /v1/models`; never downloads"),
    "max_tokens": honoured(">= 1; more than the context leaves is honoured by generating less"),
    "temperature": honoured("0 to 2; 0 is greedy; absent: the model's `generation_config.json`, else 1"),
    "top_p": honoured("0 to 1"),
    "top_k": honoured(">= 0; 0 is off (extension)"),
    "min_p": honoured("0 to 1, relative to the likeliest token (extension)"),
    "presence_penalty": honoured("-2 to 2, over the reply so far"),
    "frequency_penalty": honoured("-2 to 2, over the reply so far"),
    "repetition_penalty": honoured("above 0 to 2, over prompt and reply (extension)"),
    "seed": honoured("64-bit integer; the same draws in any batch"),
    "stop": honoured("string or up to 16 strings of up to 256 characters; found across tokens, never shown; not searched in reasoning"),
    "n": honoured("1 to 8, streamed too"),
    "logit_bias": honoured("up to 1,024 token ids, -100 to 100"),
    "stream": honoured(),
    "stream_options": honoured("`include_usage`; only with `stream`"),
    "user": noted("kept for nothing until there is an audit log"),
    "structured_outputs": honoured("one of `json`, `regex`, `choice`, `grammar` (Lark); enforced while decoding (extension)"),
    "guided_json": honoured("a JSON Schema, enforced while decoding (extension)"),
    "guided_regex": honoured("a regular expression that the whole answer matches (extension)"),
    "guided_choice": honoured("up to 1,024 texts, one of which is the answer (extension)"),
    "guided_grammar": honoured("a context-free grammar in Lark's notation (extension)"),
    "api_base": refused("a request cannot choose where it is answered"),
    "api_key": refused("a request cannot choose where it is answered"),
    "priority": refused("priority follows from the key and the endpoint"),
}

CHAT_FIELDS: Mapping[str, Rule] = {
    **_SAMPLING,
    "messages": honoured(
        "1 to 4,096; `developer` is read as `system`; `reasoning_content` and `reasoning` are accepted back; parts: text, "
        "`file` that is text or a PDF with text in it, `image_url` (`https` only where the server is told to fetch), "
        "`video_url` (extension: MP4, QuickTime or WebM of 2 minutes at most, `num_frames` of it, 8 or 1 to 32)"
    ),
    "max_completion_tokens": honoured("the same as `max_tokens`; different values of the two are refused"),
    "logprobs": honoured("under the model's own distribution, before temperature and filters"),
    "top_logprobs": honoured("0 to 20; only with `logprobs`"),
    "tools": honoured(
        "up to 256: `function`, with `strict: true` arguments follow the schema to the letter; `custom`, not with `stream`, whose `regex` "
        "is enforced, and its `lark` where calls hold plain text, and it is named in any case"
    ),
    "tool_choice": honoured("`none`, `auto`, `required`, a function or a custom tool by name, `allowed_tools`; enforced while decoding"),
    "parallel_tool_calls": honoured("false ends the reply after the first call"),
    "response_format": honoured("`text`, `json_object`, `json_schema`; enforced while decoding, after the reasoning"),
    "reasoning_effort": honoured("`none`: no reasoning; else the template's own level or a budget; ignored by models that do not reason"),
    "enable_thinking": honoured("the template's switch; named as ignored where it has none (extension)"),
    "thinking_budget": honoured("tokens of reasoning after which the answer begins; ignored by models that do not reason (extension)"),
    "chat_template_kwargs": honoured("`enable_thinking`, `reasoning_effort`, `thinking_budget`; other keys are refused (extension)"),
    "store": honoured("false; true is refused: nothing is stored"),
    "modalities": honoured('`["text"]`'),
    "metadata": noted("kept for nothing until there is an audit log"),
    "safety_identifier": noted("kept for nothing until there is an audit log"),
    "service_tier": noted("there is one tier"),
    "prompt_cache_key": noted("a hint that is not needed"),
    "prompt_cache_options": noted("a hint that is not needed"),
    "prompt_cache_retention": noted("a hint that is not needed"),
    "prediction": noted("a hint for speed"),
    "verbosity": noted("models here have no such setting"),
    "audio": refused("no model here speaks"),
    "moderation": refused("nothing is moderated here"),
    "web_search_options": refused("nothing is searched here"),
    "functions": refused("use `tools`"),
    "function_call": refused("use `tool_choice`"),
    "chat_template": refused("templates come with the model only"),
}

COMPLETION_FIELDS: Mapping[str, Rule] = {
    **_SAMPLING,
    "prompt": honoured("text, several texts, token ids, or several lists of them; choices come prompt by prompt"),
    "echo": honoured("the prompt stands before the reply; not with `logprobs`"),
    "logprobs": honoured("0 to 5"),
    "best_of": honoured("only if equal to `n`"),
    "suffix": refused("filling in the middle is not built yet"),
}
