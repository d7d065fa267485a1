"""Names for stretches of tokens: a digest says all that the keys and values of a block depend on. No tensors."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS, Digest

_DIGEST_BYTES = 16
# Changes with whatever would make files of an earlier version mean something else.
_FORMAT = "1"


@dataclass(frozen=True, slots=True)
class PrefixKeys:
    """Blocks are shared only where all of this is the same. `model` is a fingerprint of the weights and the configuration (rope
    included), `layout` says how and in which type keys and values are kept, `adapter` which adapter was applied."""

    model: str
    layout: str
    adapter: str = ""

    @property
    def fingerprint(self) -> str:
        """Hexadecimal; the name of what blocks may be exchanged with."""
        return self.root("").hex()

    def root(self, tenant: str) -> Digest:
        """The digest of the empty prefix. Tenants see nothing of each other's, not even by the clock."""
        parts = "\x1f".join((_FORMAT, str(BLOCK_TOKENS), self.model, self.layout, self.adapter, tenant))
        return hashlib.blake2b(parts.encode(), digest_size=_DIGEST_BYTES).digest()


def block_tokens(tokens: Sequence[int], block: int) -> tuple[int, ...]:
    return tuple(tokens[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS])


def extend(digests: list[Digest], tokens: Sequence[int], root: Digest) -> None:
    """Appends the digests of the full blocks of `tokens` that `digests` does not have yet. Each covers all before it."""
    for block in range(len(digests), len(tokens) // BLOCK_TOKENS):
        parent = digests[-1] if digests else root
        content = array("i", block_tokens(tokens, block)).tobytes()
        digests.append(hashlib.blake2b(parent + content, digest_size=_DIGEST_BYTES).digest())


def num_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    limit = min(len(one), len(other))
    low = 0
    while low < limit:  # stretches at a time: comparing slices is fast
        step = min(1024, limit - low)
        if tuple(one[low : low + step]) == tuple(other[low : low + step]):
            low += step
        else:
            return next(i for i in range(low, limit) if one[i] != other[i])
    return limit
