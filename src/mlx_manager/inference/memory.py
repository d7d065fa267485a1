"""How much memory models take, what fits a limit, and who must leave. All in bytes; no arrays, nothing of the machine."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from mlx_manager.hub.checkpoint import Checkpoint

Verdict = Literal["fits", "tight", "too large"]
EvictionPolicy = Literal["lru", "lfu"]
Relief = Literal["smaller prefill", "prefixes", "idle models", "loads wait", "refuse"]

KV_SHARE = 6
"""A model may have a sixth of what its weights leave for keys and values."""
LEAST_KV_TOKENS = 8192
LEAST_KV_BYTES = 64 << 20
SCORE_BYTES = 512 << 20
"""What the scores of one layer's attention may take while a prompt is computed: queries x keys x heads, in float32."""
_UNKNOWN_PASS_BYTES = 64 << 10
_MANY_HEADS = 64
_SCORE_ITEM_BYTES = 4
_TIGHT = 0.9


@dataclass(frozen=True, slots=True)
class Need:
    """What a model takes: its weights, which models with adapters on them share, by `weights_key`; the adapter; the share for keys and
    values, prefixes kept for later included; and what a pass over a piece of a prompt needs in between."""

    weights_key: str
    weights: int
    adapter: int
    kv: int
    prefill: int

    @property
    def own(self) -> int:
        """All that goes when it goes, whoever shares its weights."""
        return self.adapter + self.kv + self.prefill

    @property
    def total(self) -> int:
        return self.weights + self.own


@dataclass(frozen=True, slots=True)
class Fit:
    """A verdict with its arithmetic. `kv_for_context` is what one prompt of the whole context takes: where it is more than `need.kv`, long
    prompts are refused (`tight`)."""

    verdict: Verdict
    need: Need
    kv_for_context: int | None
    limit: int


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that takes memory, or is about to. `stays`: it is pinned, busy or being loaded. `last_used` in seconds of any one clock."""

    id: str
    need: Need
    stays: bool
    last_used: float
    num_uses: int


@dataclass(frozen=True, slots=True)
class MustLeave:
    """These, in this order; nobody, if there is room."""

    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NoRoom:
    """`needed` bytes are wanted, and `available` were there if everybody left who can."""

    needed: int
    available: int


def need(checkpoint: Checkpoint, *, available: int, kv_bytes: int | None, prefill_tokens: int) -> Need:
    """What a model takes of these many bytes. `kv_bytes` None: a sixth of what its weights leave, and in any case enough for a
    prompt of some length."""
    adapter = 0 if checkpoint.adapter is None else checkpoint.adapter.size_bytes
    return need_of(
        weights_key=str(checkpoint.path),
        weight_bytes=checkpoint.size_bytes - adapter,
        adapter_bytes=adapter,
        kv_bytes_per_token=checkpoint.kv_bytes_per_token,
        context_length=checkpoint.context_length,
        prefill=prefill_reserve(
            pass_bytes_per_token=checkpoint.pass_bytes_per_token,
            num_heads=checkpoint.num_heads,
            context_length=checkpoint.context_length,
            num_tokens=prefill_tokens,
        ),
        available=available,
        kv_bytes=0 if checkpoint.kind in ("embedding", "reranker") else kv_bytes,
    )


def need_of(
    *,
    weights_key: str,
    weight_bytes: int,
    adapter_bytes: int = 0,
    kv_bytes_per_token: int | None,
    context_length: int | None,
    prefill: int,
    available: int,
    kv_bytes: int | None,
) -> Need:
    """The same of what is known without a checkpoint."""
    if kv_bytes is None:
        kv_bytes = max(least_kv(kv_bytes_per_token, context_length), (available - weight_bytes - adapter_bytes - prefill) // KV_SHARE)
    return Need(weights_key, weight_bytes, adapter_bytes, kv_bytes, prefill)


def least_kv(kv_bytes_per_token: int | None, context_length: int | None) -> int:
    """Enough for a prompt of the whole context or of some thousand tokens, twice, since half of it may be for rows; and for states, which
    some models keep instead."""
    tokens = LEAST_KV_TOKENS if context_length is None else min(2 * context_length, LEAST_KV_TOKENS)
    return max(LEAST_KV_BYTES, 0 if kv_bytes_per_token is None else kv_bytes_per_token * tokens)


def pass_cost(pass_bytes_per_token: int | None, num_heads: int | None) -> tuple[int, int]:
    """Bytes of a pass for each of its tokens, and for each pair of one and a token that it attends to; as of a large model where nothing is
    known."""
    token = _UNKNOWN_PASS_BYTES if pass_bytes_per_token is None else pass_bytes_per_token
    return token, _SCORE_ITEM_BYTES * (_MANY_HEADS if num_heads is None else num_heads)


def prefill_reserve(*, pass_bytes_per_token: int | None, num_heads: int | None, context_length: int | None, num_tokens: int) -> int:
    """What a pass over so many prompt tokens may take, at the end of the longest prompt; its scores are bounded by smaller pieces."""
    token, pair = pass_cost(pass_bytes_per_token, num_heads)
    context = LEAST_KV_TOKENS if context_length is None else context_length
    num_tokens = min(num_tokens, context)
    return num_tokens * token + min(SCORE_BYTES, num_tokens * context * pair)


def fit(wanted: Need, *, kv_bytes_per_token: int | None, context_length: int | None, limit: int) -> Fit:
    """Whether a model alone fits a limit. `tight`: hardly anything is left, or not for a prompt of the whole context."""
    kv_for_context = None if kv_bytes_per_token is None or context_length is None else kv_bytes_per_token * context_length
    if wanted.total > limit:
        verdict: Verdict = "too large"
    elif wanted.total > _TIGHT * limit or (kv_for_context is not None and kv_for_context > wanted.kv):
        verdict = "tight"
    else:
        verdict = "fits"
    return Fit(verdict, wanted, kv_for_context, limit)


def fit_of(checkpoint: Checkpoint, *, limit: int, kv_bytes: int | None, prefill_tokens: int) -> Fit:
    """The same of a checkpoint, be it here or not."""
    wanted = need(checkpoint, available=limit, kv_bytes=kv_bytes, prefill_tokens=prefill_tokens)
    return fit(wanted, kv_bytes_per_token=checkpoint.kv_bytes_per_token, context_length=checkpoint.context_length, limit=limit)


def taken(needs: Collection[Need]) -> int:
    """By all of these together: weights that several share count once."""
    return sum({n.weights_key: n.weights for n in needs}.values()) + sum(n.own for n in needs)


def who_must_leave(residents: Sequence[Resident], wanted: Need, *, limit: int, policy: EvictionPolicy) -> MustLeave | NoRoom:
    """So that what is wanted fits. As few as the order allows: one whose leaving turns out not to be needed stays."""
    staying = [r.need for r in residents if r.stays]
    if taken([*staying, wanted]) > limit:
        shared = wanted.weights if any(n.weights_key == wanted.weights_key for n in staying) else 0
        return NoRoom(wanted.total - shared, max(0, limit - taken(staying)))
    leaving: list[Resident] = []

    def fits(leaving: Collection[Resident]) -> bool:
        return taken([*(r.need for r in residents if r not in leaving), wanted]) <= limit

    for resident in in_order((r for r in residents if not r.stays), policy):
        if fits(leaving):
            break
        leaving.append(resident)
    for resident in reversed(leaving[:-1]):
        if fits([r for r in leaving if r is not resident]):
            leaving.remove(resident)
    return MustLeave(tuple(r.id for r in leaving))


def in_order(residents: Iterable[Resident], policy: EvictionPolicy) -> list[Resident]:
    """Who leaves first: the least recently used, or the least often used, and of these the least recently used."""
    return sorted(residents, key=lambda r: (r.num_uses if policy == "lfu" else 0, r.last_used, r.id))


@dataclass(frozen=True, slots=True)
class Reading:
    """Of the memory, now. `active` and `cached` are MLX's; `available` and `total` the machine's."""

    active: int
    cached: int
    limit: int
    available: int
    total: int

    @property
    def pressure(self) -> float:
        """1.0: all that there may be, or all that there is."""
        return max((self.active + self.cached) / self.limit, 1.0 - self.available / self.total)


RELIEF: Mapping[Relief, float] = MappingProxyType(
    {"smaller prefill": 0.85, "prefixes": 0.90, "idle models": 0.95, "loads wait": 0.98, "refuse": math.nextafter(1.0, 2.0)}
)
"""From which pressure on what is done, the mildest first."""
_EASED = 0.05


def relief(reading: Reading, before: Collection[Relief]) -> tuple[Relief, ...]:
    """What the memory asks for now, after what was done `before`: a step ends only when the pressure is clearly below where it began."""
    pressure = reading.pressure
    return tuple(step for step, start in RELIEF.items() if pressure >= (start - _EASED if step in before else start))
