"""`POST /v1/tokenize` and `/v1/detokenize`, in vLLM's shape: what a model makes of a prompt, and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.requests import Conversation, Prompt, RawPrompt
from mlx_manager.protocols.checked import checked
from mlx_manager.protocols.fields import Rule, Schema, honoured, refused
from mlx_manager.protocols.openai import schema
from mlx_manager.protocols.openai.requests import conversation_of
from mlx_manager.protocols.wire import Json

# What of a chat request its prompt is made of.
_OF_CHAT = ("tools", "tool_choice", "enable_thinking", "reasoning_effort", "thinking_budget", "chat_template_kwargs")


class TokenizeSchema(Schema):
    model: Annotated[str, Field(min_length=1, max_length=256)]
    prompt: str | None = None
    messages: Annotated[list[schema.Message], Field(min_length=1, max_length=4096)] | None = None
    tools: Annotated[list[schema.Tool], Field(max_length=256)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: schema.Effort | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeSchema(Schema):
    model: Annotated[str, Field(min_length=1, max_length=256)]
    tokens: list[Annotated[int, Field(ge=0)]]


TOKENIZE_FIELDS: Mapping[str, Rule] = {
    "model": honoured("required; must be one of `GET /v1/models`; its weights are not loaded"),
    "prompt": honoured("text; this or `messages`"),
    "messages": honoured("as in a chat request; rendered by the model's template"),
    **{name: honoured("as in a chat request; only with `messages`") for name in _OF_CHAT},
    "add_special_tokens": honoured("absent: true for `prompt`; with `messages` true is refused, since the template writes them"),
    "add_generation_prompt": honoured("true; false is refused"),
    "continue_final_message": honoured("false; true is refused"),
    "return_token_strs": honoured("true: `token_strs` holds each token as the vocabulary spells it"),
    "chat_template": refused("templates come with the model only"),
}
DETOKENIZE_FIELDS: Mapping[str, Rule] = {
    "model": honoured("required; must be one of `GET /v1/models`; its weights are not loaded"),
    "tokens": honoured("token ids; special tokens are written out"),
}


@dataclass(frozen=True, slots=True)
class WantedTokens:
    """`add_special_tokens` is for a prompt that is text."""

    model: str
    prompt: Prompt
    add_special_tokens: bool
    token_strs: bool
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WantedText:
    model: str
    tokens: tuple[int, ...]
    ignored: tuple[str, ...]


def read_tokenize(body: bytes) -> WantedTokens:
    """Raises `InvalidField`."""
    wire, ignored = checked(body, TokenizeSchema, TOKENIZE_FIELDS)
    if wire.prompt is None and wire.messages is None:
        raise InvalidField("Missing required parameter: 'prompt' or 'messages'.", param="prompt", code="missing_required_parameter")
    if wire.prompt is not None:
        for name in ("messages", *_OF_CHAT):
            if getattr(wire, name) is not None:
                raise InvalidField(f"'{name}' cannot be combined with 'prompt'.", param=name)
    if wire.add_generation_prompt is False:
        raise _unsupported("add_generation_prompt", "what is counted is what a chat request would send")
    if wire.continue_final_message:
        raise _unsupported("continue_final_message", "what is counted is what a chat request would send")
    if wire.messages is not None and wire.add_special_tokens:
        raise _unsupported("add_special_tokens", "the chat template writes them")
    prompt = _conversation(wire) if wire.prompt is None else RawPrompt(wire.prompt)
    return WantedTokens(wire.model, prompt, wire.add_special_tokens is not False, wire.return_token_strs is True, ignored)


def _conversation(wire: TokenizeSchema) -> Conversation:
    """Its parts have been checked."""
    return conversation_of(schema.ChatRequest.model_validate({name: getattr(wire, name) for name in ("model", "messages", *_OF_CHAT)}))


def _unsupported(param: str, why: str) -> InvalidField:
    return InvalidField(f"This value of '{param}' is not supported: {why}.", param=param, code="unsupported_value")


def write_tokens(tokens: tuple[int, ...], max_model_len: int, token_strs: list[str] | None) -> Json:
    reply: Json = {"tokens": list(tokens), "count": len(tokens), "max_model_len": max_model_len}
    return reply if token_strs is None else {**reply, "token_strs": token_strs}


def read_detokenize(body: bytes) -> WantedText:
    """Raises `InvalidField`."""
    wire, ignored = checked(body, DetokenizeSchema, DETOKENIZE_FIELDS)
    return WantedText(wire.model, tuple(wire.tokens), ignored)
