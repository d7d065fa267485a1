"""One sequence of tokens that the engine is working on. No arrays."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol

from mlx_manager.core.events import Timing
from mlx_manager.core.requests import Priority
from mlx_manager.inference.engine.block_pool import Digest
from mlx_manager.inference.picture import PlacedPicture

EndReason = Literal["stop", "length"]

URGENCY: Mapping[Priority, int] = MappingProxyType({"high": 0, "normal": 1, "low": 2})


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


class Constraint(Protocol):
    """Which tokens may come next in one sequence; told of every token but the last. On the device thread.
    `field` of the request asked for it."""

    @property
    def field(self) -> str: ...
    def mask(self) -> bytes | None:
        """A bit for each token, least significant first: set where it may come. None: any may."""
        ...

    def accept(self, token: int) -> bool:
        """Goes on behind a token that came. False if that cannot be, or costs too much: the reply ends."""
        ...

    @property
    def is_complete(self) -> bool:
        """Nothing may follow."""
        ...


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """What is wanted: `prompt` is not empty; generation ends at a token of `stop_tokens` or after `max_tokens` (>= 1).
    `num_top_logprobs` None: no log probabilities; otherwise how many alternatives to report beside the chosen token.

    `constraint` belongs to this sequence alone. `client` is who shares in the places fairly; `tenant` who shares blocks; `deadline`
    a `time.monotonic()`.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: TokenSampling
    stop_tokens: frozenset[int] = frozenset()
    num_top_logprobs: int | None = None
    priority: Priority = "normal"
    client: str = ""
    tenant: str = ""
    deadline: float | None = None
    constraint: Constraint | None = None
    pictures: tuple[PlacedPicture, ...] = ()


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

    Of its `tokens` (prompt, then what was generated and read), `num_queued` have their keys and values queued or written and
    `num_computed` written for sure; `num_sampled` tokens have been sampled, read or not. What stood at admission, but for the last
    token, is prefilled (`prefill_end` tokens); the last one goes through decode, or is the end of a chunk that samples.
    `table[i]` is the block of tokens 32 i … 32 i + 31, `digests[i]` its name once it is full.
    """

    def __init__(self, spec: SequenceSpec, index: int) -> None:
        assert spec.prompt, "a sequence starts with at least one token"
        assert spec.max_tokens >= 1
        self.spec = spec
        self.index = index
        self.tokens = list(spec.prompt)
        self.num_queued = 0
        self.num_computed = 0
        self.num_sampled = 0
        self.num_cached = 0
        self.prefill_end = len(spec.prompt) - 1
        self.table: list[int] = []
        self.digests: list[Digest] = []
        self.tail: int | None = None  # goes on from a copy of this beginning of a block
        self.num_published = 0
        self.parting: set[int] = set()  # where those who wait for it go another way: a state is needed there
        self.position_shift = 0  # of what follows the pictures, which take fewer positions than tokens in some models
        self.finished = False
        self.urgency = URGENCY[spec.priority]  # less is more; raised if somebody more urgent waits for what it computes
        self.submitted = time.monotonic()
        self.waited_s = 0.0  # up to its last admission; still counting while it waits
        self.waiting_since: float | None = self.submitted
        self.admitted: float | None = None
        self.first_token: float | None = None

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.spec.prompt)

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.spec.prompt) :]

    @property
    def num_prefill_left(self) -> int:
        return max(0, self.prefill_end - self.num_queued)

    @property
    def wants_decode(self) -> bool:
        is_prefilled = self.num_computed >= self.prefill_end or self.num_queued > self.prefill_end
        return not self.finished and is_prefilled and self.num_sampled < self.spec.max_tokens

    @property
    def last_token(self) -> int:
        return self.tokens[-1]

    def timing(self) -> Timing:
        return Timing(self.submitted, self.admitted, self.first_token, time.monotonic())
