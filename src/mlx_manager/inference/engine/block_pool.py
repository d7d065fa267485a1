"""Who holds which block of keys and values, and which may be reused. No tensors.

A block is room for `BLOCK_TOKENS` tokens in every layer. Sequences hold blocks by reference; a full block whose content is known
by a digest can be shared by any number of them, and stays findable after the last one let go, until its room is needed.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

BLOCK_TOKENS = 32
NULL_BLOCK = 0  # holds no tokens; unused entries of a block table point at it

Digest = bytes


@dataclass(frozen=True, slots=True)
class Content:
    """What a findable block holds: these tokens after everything that `parent` stands for. `resumable` says that a sequence can
    go on from its end: where layers keep a state beside keys and values, only the blocks that a chunk ended with are."""

    digest: Digest
    parent: Digest
    tokens: tuple[int, ...]
    resumable: bool


def _nothing(block: int, content: Content) -> None:
    pass


class BlockPool:
    """Blocks 1 … `num_blocks` - 1, each of them exactly one of: free, held (by at least one reference), or cached (held by nobody,
    findable by its digest, the least recently used first in line for reuse). Owned by the device thread.

    `on_forget(block, content)` is called when a block stops being findable, before anybody can write to it.
    """

    def __init__(self, num_blocks: int, on_forget: Callable[[int, Content], None] = _nothing) -> None:
        assert num_blocks >= 2, "the null block and one more"
        self.num_blocks = num_blocks
        self.on_forget = on_forget
        self.num_evictions = 0
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._num_refs = [0] * num_blocks
        self._content: dict[int, Content] = {}
        self._by_digest: dict[Digest, int] = {}
        self._after: dict[Digest, dict[int, None]] = {}  # the blocks that come after a prefix, the newest last
        self._cached: OrderedDict[int, None] = OrderedDict()

    def forget_nothing(self) -> None:
        """Nobody is told any more."""
        self.on_forget = _nothing

    @property
    def num_usable(self) -> int:
        """All blocks that can hold tokens."""
        return self.num_blocks - 1

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give out."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_usable - self.num_available

    def allocate(self) -> int | None:
        """A block with one reference and no content, the least recently used cached one if none is free; None if all are held."""
        if self._free:
            block = self._free.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            self.num_evictions += 1
        else:
            return None
        self._num_refs[block] = 1
        return block

    def find(self, digest: Digest, tokens: Sequence[int]) -> int | None:
        """The block with these tokens at the end of this chain. It is not held yet: `share` it before the next `allocate`."""
        block = self._by_digest.get(digest)
        if block is None or self._content[block].tokens != tuple(tokens):
            return None  # two contents with one digest are not to be expected, and must not answer for each other
        return block

    def after(self, parent: Digest, most: int) -> list[tuple[int, tuple[int, ...]]]:
        """The newest findable blocks that come after a prefix, with their tokens."""
        return [(block, self._content[block].tokens) for block in islice(reversed(self._after.get(parent, {})), most)]

    def content(self, block: int) -> Content | None:
        return self._content.get(block)

    def is_cached(self, block: int) -> bool:
        return block in self._cached

    def share(self, block: int) -> None:
        """One more reference to a block that is held or cached."""
        if self._num_refs[block] == 0:
            del self._cached[block]
        self._num_refs[block] += 1

    def release(self, block: int) -> None:
        """One reference less. With the last one it becomes free, or cached if its content can be found."""
        assert self._num_refs[block] > 0, "released more often than held"
        self._num_refs[block] -= 1
        if self._num_refs[block] == 0:
            if block in self._content:
                self._cached[block] = None
            else:
                self._free.append(block)

    def publish(self, block: int, content: Content) -> bool:
        """Makes a full, held block findable. False if it stays unknown: of two blocks with one content the first is the known one.
        If only the second can be resumed from, nobody holds the first and it is forgotten for it."""
        assert self._num_refs[block] > 0, "only who holds a block knows its content"
        assert len(content.tokens) == BLOCK_TOKENS, "only a full block never changes"
        known = self._by_digest.get(content.digest)
        if block in self._content:
            return False
        if known is not None:
            if not content.resumable or self._content[known].resumable or known not in self._cached:
                return False
            self._free_cached(known)
        self._content[block] = content
        self._by_digest[content.digest] = block
        self._after.setdefault(content.parent, {})[block] = None
        return True

    def is_shared(self, block: int) -> bool:
        """Whether writing to it would change what somebody else reads."""
        return self._num_refs[block] > 1 or block in self._content

    def evict(self, num_blocks: int) -> int:
        """Frees up to this many cached blocks, least recently used first; how many it freed."""
        evicted = 0
        while evicted < num_blocks and self._cached:
            self._free_cached(next(iter(self._cached)))
            evicted += 1
        self.num_evictions += evicted
        return evicted

    def evict_resumable(self) -> bool:
        """Frees the least recently used cached block that can be resumed from: the state that it stands for takes memory of its own."""
        for block in self._cached:
            if self._content[block].resumable:
                self._free_cached(block)
                self.num_evictions += 1
                return True
        return False

    def cached_contents(self) -> list[tuple[int, Content]]:
        """Everything findable, the least recently used first, what is held last."""
        held = [b for b in self._content if b not in self._cached]
        return [(block, self._content[block]) for block in (*self._cached, *held)]

    def _free_cached(self, block: int) -> None:
        del self._cached[block]
        self._forget(block)
        self._free.append(block)

    def _forget(self, block: int) -> None:
        content = self._content[block]
        self.on_forget(block, content)
        del self._content[block]
        del self._by_digest[content.digest]
        siblings = self._after[content.parent]
        del siblings[block]
        if not siblings:
            del self._after[content.parent]

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Every reference is an entry of a table, and every block is in exactly one state. Raises `AssertionError`."""
        counted = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counted[block] += 1
        assert counted[NULL_BLOCK] == 0, "a table holds the null block"
        assert counted == self._num_refs, "references do not match the tables"
        held = {b for b in range(1, self.num_blocks) if self._num_refs[b] > 0}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert held | free | cached == set(range(1, self.num_blocks)), "a block is lost"
        assert len(held) + len(free) + len(cached) == self.num_usable, "a block is in two states"
        assert {d: b for b, d in ((b, c.digest) for b, c in self._content.items())} == self._by_digest, "digests do not match blocks"
        assert {b: c.parent for b, c in self._content.items()} == {b: p for p, blocks in self._after.items() for b in blocks}
        assert cached <= set(self._content), "a cached block cannot be found"
        assert not free & set(self._content), "a free block can be found"
