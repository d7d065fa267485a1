"""A profile: a named way to ask a model, and what it makes of a request. Pure."""

from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

from mlx_manager.core.messages import Message
from mlx_manager.core.requests import Conversation, GenerationRequest, Prompt, Reasoning, Sampling

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Profile:
    """What is said for a client that does not say it itself; None says nothing. Clients call it `model:name`. `context_limit` is in
    tokens of prompt and reply together; `version` counts the changes, from 1."""

    model: str
    name: str
    description: str = ""
    adapter: str | None = None
    system_prompt: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    reasoning: Reasoning = field(default_factory=Reasoning)
    context_limit: int | None = None
    version: int = 1

    @property
    def id(self) -> str:
        return f"{self.model}:{self.name}"

    @property
    def target(self) -> str:
        """The model as the pool knows it."""
        return self.model if self.adapter is None else f"{self.model}:{self.adapter}"


def applied(request: GenerationRequest, profile: Profile) -> GenerationRequest:
    """The request with what it left open; what the client said stays, `0`, `""`, `false` and `[]` too."""
    return replace(
        request,
        model=profile.target,
        prompts=tuple(_prompt(prompt, profile) for prompt in request.prompts),
        sampling=_sampling(request.sampling, profile.sampling),
        max_tokens=_either(request.max_tokens, profile.max_tokens),
        stop=_either(request.stop, profile.stop),
        context_limit=_either(request.context_limit, profile.context_limit),
    )


def _either(said: T | None, otherwise: T | None) -> T | None:
    return otherwise if said is None else said


def _prompt(prompt: Prompt, profile: Profile) -> Prompt:
    if not isinstance(prompt, Conversation):
        return prompt
    messages = prompt.messages
    has_system = prompt.without_system or any(message.role == "system" for message in messages)
    if profile.system_prompt is not None and not has_system:
        messages = (Message("system", profile.system_prompt), *messages)
    return replace(prompt, messages=messages, reasoning=_reasoning(prompt.reasoning, profile.reasoning))


def _sampling(said: Sampling, otherwise: Sampling) -> Sampling:
    absent = [given.name for given in fields(Sampling) if getattr(said, given.name) is None]
    return replace(said, **{name: getattr(otherwise, name) for name in absent})


def _reasoning(said: Reasoning, otherwise: Reasoning) -> Reasoning:
    """Whether to think is one question, which any of the options answers: if the client did, nothing here answers it again."""
    match said.wants_thinking:
        case None:
            return otherwise
        case False:
            return said
        case True:
            effort = None if otherwise.effort == "none" else otherwise.effort
            budget = None if otherwise.budget == 0 else otherwise.budget
            return replace(said, effort=_either(said.effort, effort), budget=_either(said.budget, budget))
