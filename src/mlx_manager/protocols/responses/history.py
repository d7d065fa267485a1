"""The responses that a client may come back to, and the items that it may name: kept in memory, bounded, for a while."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mlx_manager.protocols.wire import Json

MAX_RESPONSES = 1024
MAX_BYTES = 64 << 20
MAX_AGE_S = 3600.0
# Of all clients together.
MAX_TOTAL_BYTES = 256 << 20


@dataclass(slots=True, eq=False)
class Item:
    """One item of an input or an output, as it goes over the wire; `num_bytes` of it as JSON. Shared by the responses that have it:
    `holders` counts them, and is the history's."""

    json: Json
    num_bytes: int
    holders: int = 0

    @property
    def id(self) -> str:
        return self.json["id"]


def item_of(wire: Json) -> Item:
    return Item(wire, size_of(wire))


def size_of(wire: Json) -> int:
    """In bytes, as JSON."""
    return len(json.dumps(wire, ensure_ascii=False).encode())


@dataclass(frozen=True, slots=True)
class Kept:
    """`input` has all that went before `response`, of earlier responses too."""

    response: Json
    input: tuple[Item, ...]
    output: tuple[Item, ...]
    num_bytes: int
    kept_at: float

    @property
    def items(self) -> Iterator[Item]:
        yield from self.input
        yield from self.output


@dataclass(slots=True)
class _Shelf:
    """What one client has: oldest first; `items` by id, the newest of an id."""

    responses: dict[str, Kept] = field(default_factory=dict[str, Kept])
    items: dict[str, Item] = field(default_factory=dict[str, Item])
    num_bytes: int = 0


class History:
    """Owned by the event loop. `clock` gives seconds. Who asks for what is another's, or gone, finds nothing."""

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        max_responses: int = MAX_RESPONSES,
        max_bytes: int = MAX_BYTES,
        max_total_bytes: int = MAX_TOTAL_BYTES,
        max_age_s: float = MAX_AGE_S,
    ) -> None:
        self._clock = clock
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._max_total_bytes = max_total_bytes
        self._max_age_s = max_age_s
        self._shelves: dict[str, _Shelf] = {}
        self._order: dict[tuple[str, str], None] = {}  # client and response, oldest first

    def keep(self, client: str, response: Json, given: Sequence[Item], made: Sequence[Item], num_bytes: int) -> None:
        """Keeps a response (`num_bytes` without its items) and what it was `given` and has `made`; the oldest go if there are too many."""
        kept = Kept(response, tuple(given), tuple(made), num_bytes, self._clock())
        shelf = self._shelves.setdefault(client, _Shelf())
        assert response["id"] not in shelf.responses
        shelf.responses[response["id"]] = kept
        self._order[client, response["id"]] = None
        shelf.num_bytes += num_bytes
        for item in kept.items:
            if item.holders == 0:
                shelf.num_bytes += item.num_bytes
            item.holders += 1
            shelf.items[item.id] = item
        self._tidy()
        while len(shelf.responses) > self._max_responses or shelf.num_bytes > self._max_bytes:
            self.drop(client, next(iter(shelf.responses)))
        while self.num_bytes > self._max_total_bytes:
            self.drop(*next(iter(self._order)))

    def response(self, client: str, response_id: str) -> Kept | None:
        self._tidy()
        shelf = self._shelves.get(client)
        return None if shelf is None else shelf.responses.get(response_id)

    def item(self, client: str, item_id: str) -> Item | None:
        self._tidy()
        shelf = self._shelves.get(client)
        return None if shelf is None else shelf.items.get(item_id)

    def drop(self, client: str, response_id: str) -> bool:
        """Whether it was there."""
        shelf = self._shelves.get(client)
        kept = None if shelf is None else shelf.responses.pop(response_id, None)
        if shelf is None or kept is None:
            return False
        del self._order[client, response_id]
        shelf.num_bytes -= kept.num_bytes
        for item in kept.items:
            item.holders -= 1
            if item.holders == 0:
                shelf.num_bytes -= item.num_bytes
                if shelf.items.get(item.id) is item:
                    del shelf.items[item.id]
        if not shelf.responses:
            del self._shelves[client]
        return True

    @property
    def num_bytes(self) -> int:
        return sum(shelf.num_bytes for shelf in self._shelves.values())

    def _tidy(self) -> None:
        """Lets go of what is too old."""
        oldest_allowed = self._clock() - self._max_age_s
        while self._order:
            client, response_id = next(iter(self._order))
            if self._shelves[client].responses[response_id].kept_at > oldest_allowed:
                return
            self.drop(client, response_id)
