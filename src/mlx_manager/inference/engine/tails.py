"""Ends of sequences that fill no block. Where a copy of them is cheap, who goes on from there need not compute them again: the same
question asked once more, or the next turn of a conversation. No tensors."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from mlx_manager.inference.engine.block_pool import Digest
from mlx_manager.inference.engine.prefix import num_alike


class Tails:
    """At most so many; the least recently used goes first. Their names are negative, so that they can be kept where blocks are, beside
    those of the pool."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._tails: OrderedDict[int, tuple[Digest, tuple[int, ...]]] = OrderedDict()

    def put(self, prefix: Digest, tokens: Sequence[int]) -> int | None:
        """The name that a tail after a prefix is to be saved under, in place of what was there; None if it is not worth it."""
        if self._most == 0 or not tokens:
            return None
        for name, known in self.after(prefix):
            length = num_alike(known, tokens)
            if length == len(tokens):
                self._tails.move_to_end(name)
                return None
            if length == len(known):  # it goes on
                break
        else:
            name = next(iter(self._tails)) if len(self._tails) == self._most else -1 - len(self._tails)
        self._tails[name] = prefix, tuple(tokens)
        self._tails.move_to_end(name)
        return name

    def after(self, prefix: Digest) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The names of the tails after a prefix, and their tokens."""
        return ((name, tokens) for name, (before, tokens) in self._tails.items() if before == prefix)

    def use(self, name: int) -> None:
        """Somebody goes on from there."""
        self._tails.move_to_end(name)

    def clear(self) -> list[int]:
        """Forgets all of them; their names."""
        names = list(self._tails)
        self._tails.clear()
        return names
