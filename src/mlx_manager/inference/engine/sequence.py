"""One sequence of tokens that the engine is working on. No arrays."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from mlx_manager.core.events import Timing

EndReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenSampling:
    """How the next token of a sequence is chosen; every value is resolved.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 do nothing.
    Repetition looks at prompt and output, presence and frequency at the output alone.
    """

    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def filters(self) -> bool:
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """What is wanted: `prompt` is not empty; generation ends at a token of `stop_tokens` or after `max_tokens` (>= 1).
    `num_top_logprobs` None: no log probabilities; otherwise how many alternatives to report beside the chosen token."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: TokenSampling
    stop_tokens: frozenset[int] = frozenset()
    num_top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token of sequence `index` of its submission. `top`: (token, logprob) pairs, likeliest first."""

    index: int
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """The last item of sequence `index`. A stop token that ended it is not among its tokens."""

    index: int
    reason: EndReason
    timing: Timing


class Sequence:
    """Progress of one sequence. Owned by the device thread; `index` is its place in its submission.

    `num_computed` tokens have their keys and values queued or written; `num_sampled` have been sampled, read or not.
    The last prompt token is not prefilled: it goes through decode, so that sampling exists once.
    """

    def __init__(self, spec: SequenceSpec, index: int) -> None:
        assert spec.prompt, "a sequence starts with at least one token"
        assert spec.max_tokens >= 1
        self.spec = spec
        self.index = index
        self.generated: list[int] = []
        self.num_computed = 0
        self.num_sampled = 0
        self.finished = False
        self.submitted = time.monotonic()
        self.admitted: float | None = None
        self.first_token: float | None = None

    @property
    def num_prefill_left(self) -> int:
        return max(0, len(self.spec.prompt) - 1 - self.num_computed)

    @property
    def wants_decode(self) -> bool:
        return not self.finished and self.num_prefill_left == 0 and self.num_sampled < self.spec.max_tokens

    @property
    def last_token(self) -> int:
        return self.generated[-1] if self.generated else self.spec.prompt[-1]

    def timing(self) -> Timing:
        return Timing(self.submitted, self.admitted, self.first_token, time.monotonic())
