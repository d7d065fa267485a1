"""Why a prompt's keys and values were there only so far: the question after every slow first token. No tensors."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS
from mlx_manager.inference.engine.prefix import num_alike

Reason = Literal["all", "short", "new", "differs", "continues", "evicted", "computing", "state"]

REASONS: dict[Reason, str] = {
    "all": "Every whole block before the last token is there.",
    "short": f"The prompt is too short: blocks have {BLOCK_TOKENS} tokens, and the last token is always computed.",
    "new": "No recent request began like this.",
    "differs": "From this token on the text is another than that of the most similar recent request.",
    "continues": "The most similar recent request ended here; what follows is new.",
    "evicted": "A recent request had more of this, but its blocks gave way to others since.",
    "computing": "A request that is being computed has more of this; what it has done can be shared block by block.",
    "state": "There is more, but this model also keeps a state, which is kept only where a stretch of a prompt ended.",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """Of `num_tokens`, the first `num_cached` need not be computed, `num_on_disk` more could be read back. The prompt is like that of
    the most similar recent request up to token `position`, where `ours` follows here and `theirs` there (a few tokens each)."""

    num_tokens: int
    num_cached: int
    num_on_disk: int
    reason: Reason
    position: int
    ours: tuple[int, ...]
    theirs: tuple[int, ...]


class RecentTokens:
    """What the last sequences read and wrote, so that a prompt can be compared with it."""

    def __init__(self, most: int = 64) -> None:
        self._recent: deque[tuple[str, tuple[int, ...]]] = deque(maxlen=most)

    def note(self, tenant: str, tokens: Sequence[int]) -> None:
        self._recent.append((tenant, tuple(tokens)))

    def of(self, tenant: str) -> list[tuple[int, ...]]:
        """Newest first; never another tenant's."""
        return [tokens for t, tokens in reversed(self._recent) if t == tenant]


def explain(
    tokens: Sequence[int],
    *,
    num_cached: int,
    num_found: int,
    num_on_disk: int,
    recent: Iterable[Sequence[int]],
    running: Iterable[Sequence[int]],
) -> Explanation:
    """`num_found` tokens have blocks; of them `num_cached` can be used."""
    running = list(running)
    closest: Sequence[int] = ()
    position = -1
    for other in [*running, *recent]:
        if (common := num_alike(tokens, other)) > position:
            closest, position = other, common
    position = max(position, 0)
    wanted = (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    reason: Reason
    if num_cached >= max(wanted, 1):
        reason = "all"
    elif wanted == 0:
        reason = "short"
    elif num_found > num_cached:
        reason = "state"
    elif position >= num_cached + BLOCK_TOKENS:
        reason = "computing" if any(closest is r for r in running) else "evicted"
    elif position == 0:
        reason = "new"
    else:
        reason = "continues" if position == len(closest) else "differs"
    window = slice(position, position + 16)
    return Explanation(len(tokens), num_cached, num_on_disk, reason, position, tuple(tokens[window]), tuple(closest[window]))
