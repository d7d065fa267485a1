"""What a client asks for, whatever wire it came over.

`None` means that the client did not say; zero, false and the empty string are answers. Absent values are resolved in one
place, where the model's own defaults are known (`inference.local_model`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from mlx_manager.core.messages import Message

JsonObject = Mapping[str, Any]
Priority = Literal["high", "normal", "low"]


def _nothing() -> JsonObject:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Ranges are those of the published field matrix (`docs/api-fields.md`)."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A function that the model may call. `parameters` is a JSON Schema."""

    name: str
    description: str | None = None
    parameters: JsonObject = field(default_factory=_nothing)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt that a chat template renders."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: Literal["auto", "none"] = "auto"
    template_options: JsonObject = field(default_factory=_nothing)


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """A prompt that goes to the model as it is: text, or token ids."""

    text: str | tuple[int, ...]


Prompt = Conversation | RawPrompt


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Replies wanted from one model: `num_replies` for each prompt.

    Choices are numbered prompt by prompt: choice `p * num_replies + i` is reply `i` to prompt `p`.
    `num_top_logprobs` None: no log probabilities; 0: those of the chosen tokens; k: the k likeliest as well.
    The server says, not the client: `priority`, the `client` who shares fairly with others, and `timeout_s` for the whole reply.
    """

    model: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    num_replies: int = 1
    num_top_logprobs: int | None = None
    parallel_tool_calls: bool = True
    priority: Priority = "normal"
    client: str = ""
    timeout_s: float | None = None
