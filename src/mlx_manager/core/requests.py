"""What a client asks for, whatever wire it came over.

`None` means that the client did not say; zero, false and the empty string are answers. Absent values are a profile's, if the client
asked by one (`settings.profiles`), and else resolved in one place, where the model's own defaults are known (`inference.dialect`).
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
    """A function that the model may call. `parameters` is a JSON Schema; with `strict` the arguments follow it to the letter. `form` is
    what the text has to match that is the one parameter of some."""

    name: str
    description: str | None = None
    parameters: JsonObject = field(default_factory=_nothing)
    strict: bool = False
    form: "Regex | Grammar | None" = None


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may call (`auto`), must (`required`) or must not (`none`), and which tools: None is all of them."""

    mode: Literal["auto", "required", "none"] = "auto"
    names: tuple[str, ...] | None = None


ReasoningOption = Literal["enabled", "effort", "budget"]
REASONING_OPTIONS: tuple[ReasoningOption, ...] = ("enabled", "effort", "budget")
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How much a model is to think before it answers: at all, how hard, and at most so many tokens."""

    enabled: bool | None = None
    effort: Effort | None = None
    budget: int | None = None

    @property
    def wants_thinking(self) -> bool | None:
        """Whether to think at all; None: as the model likes."""
        if self.enabled is not None:
            return self.enabled
        if self.effort is not None:
            return self.effort != "none"
        return None if self.budget is None else self.budget > 0

    @property
    def given(self) -> tuple[ReasoningOption, ...]:
        """What the client said."""
        return tuple(name for name in REASONING_OPTIONS if getattr(self, name) is not None)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt that a chat template renders. With `continues` the reply goes on with the last message, which is the assistant's.
    `without_system`: that there is no system message was said, and is not for others to fill in."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    reasoning: Reasoning = Reasoning()
    continues: bool = False
    without_system: bool = False


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """A prompt that goes to the model as it is: text, or token ids."""

    text: str | tuple[int, ...]


Prompt = Conversation | RawPrompt


@dataclass(frozen=True, slots=True)
class AnyJson:
    """A JSON object of any shape."""


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that follows `schema`. Not `strict`: what of it can be enforced is."""

    schema: JsonObject | bool
    strict: bool = True


@dataclass(frozen=True, slots=True)
class Regex:
    pattern: str


@dataclass(frozen=True, slots=True)
class OneOf:
    """Exactly one of these texts."""

    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grammar:
    """Text of a context-free grammar in Lark's notation."""

    lark: str


OutputFormat = AnyJson | JsonSchema | Regex | OneOf | Grammar


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Replies wanted from one model: `num_replies` for each prompt.

    Choices are numbered prompt by prompt: choice `p * num_replies + i` is reply `i` to prompt `p`.
    `max_tokens` 0 computes the prompts and replies nothing. `output` is the form that the answer (not the reasoning) must have, and
    `output_field` the field that asked for it.
    `num_top_logprobs` None: no log probabilities; 0: those of the chosen tokens; k: the k likeliest as well.
    `stop` None: nothing was said; (): nothing is to stop it. `default_max_tokens` is what the endpoint documents for a request that says
    nothing of `max_tokens`.
    The server says, not the client: `context_limit` (tokens of prompt and reply together, if less than the model takes), `priority`, the
    `client` who shares fairly with others, and `timeout_s` for the whole reply.
    """

    model: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    default_max_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    num_replies: int = 1
    num_top_logprobs: int | None = None
    output: OutputFormat | None = None
    output_field: str = field(default="response_format", compare=False)
    parallel_tool_calls: bool = True
    context_limit: int | None = None
    priority: Priority = "normal"
    client: str = ""
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A vector wanted for each input: text, or token ids that go to the model as they are. `dimensions` None: as many as the model makes.
    `where` names each input as the client wrote it; `timeout_s` is the server's, for the whole reply."""

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    where: tuple[str, ...] = field(compare=False)
    dimensions: int | None = None
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """How well each document answers the query."""

    model: str
    query: str
    documents: tuple[str, ...]
    timeout_s: float | None = None
