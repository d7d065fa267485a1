"""What a client may come back to: bounded, its own only, and every item is counted once."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mlx_manager.protocols.responses.history import History, Item, item_of


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def response(name: str) -> dict[str, Any]:
    return {"id": name}


def text(name: str, length: int = 0) -> Item:
    return item_of({"id": name, "text": "x" * length})


def test_a_response_and_its_items_are_there_for_their_own_client_only() -> None:
    history = History(Clock())
    given, made = text("msg_1"), text("msg_2")
    history.keep("anna", response("resp_1"), [given], [made], 10)
    kept = history.response("anna", "resp_1")
    assert kept is not None
    assert (kept.response, kept.input, kept.output) == (response("resp_1"), (given,), (made,))
    assert history.item("anna", "msg_1") is given
    assert history.item("anna", "msg_2") is made
    assert history.response("bert", "resp_1") is None
    assert history.item("bert", "msg_1") is None
    assert not history.drop("bert", "resp_1")


def test_the_oldest_go_when_there_are_too_many_and_others_are_left_alone() -> None:
    history = History(Clock(), max_responses=2)
    history.keep("bert", response("b"), [], [], 1)
    for name in ("r1", "r2", "r3"):
        history.keep("anna", response(name), [text(f"msg_{name}")], [], 1)
    assert [history.response("anna", name) is not None for name in ("r1", "r2", "r3")] == [False, True, True]
    assert history.item("anna", "msg_r1") is None
    assert history.response("bert", "b") is not None


def test_what_is_shared_by_responses_counts_once_and_stays_until_the_last_goes() -> None:
    history = History(Clock())
    shared = text("msg_1", 1000)
    history.keep("anna", response("r1"), [shared], [], 1)
    before = history.num_bytes
    history.keep("anna", response("r2"), [shared, shared], [text("msg_2")], 1)
    assert history.num_bytes < before + 100
    assert history.drop("anna", "r1")
    assert history.item("anna", "msg_1") is shared
    assert history.drop("anna", "r2")
    assert history.item("anna", "msg_1") is None
    assert history.num_bytes == 0


def test_what_is_larger_than_all_there_is_room_for_is_not_kept() -> None:
    history = History(Clock(), max_bytes=500)
    history.keep("anna", response("r1"), [text("msg_1", 1000)], [], 1)
    assert history.response("anna", "r1") is None
    assert history.num_bytes == 0


def test_the_clients_together_have_a_bound_too() -> None:
    history = History(Clock(), max_total_bytes=2500)
    for client in ("anna", "bert", "carl"):
        history.keep(client, response("r"), [text("msg_1", 1000)], [], 1)
    assert [history.response(client, "r") is not None for client in ("anna", "bert", "carl")] == [False, True, True]


def test_an_hour_later_nothing_is_left() -> None:
    clock = Clock()
    history = History(clock)
    history.keep("anna", response("r1"), [text("msg_1")], [], 1)
    clock.now = 3599
    history.keep("anna", response("r2"), [], [], 1)
    assert history.response("anna", "r1") is not None
    clock.now = 3600
    assert history.item("anna", "msg_1") is None
    assert history.response("anna", "r1") is None
    assert history.response("anna", "r2") is not None


class Keeping(RuleBasedStateMachine):
    """Whatever is kept and dropped, the bounds hold and the count of bytes is that of what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.history = History(self.clock, max_responses=3, max_bytes=400, max_total_bytes=700, max_age_s=10)
        self.num_kept = 0

    @rule(client=st.sampled_from("abc"), lengths=st.lists(st.integers(0, 120), max_size=3), again=st.booleans(), size=st.integers(0, 90))
    def keep(self, client: str, lengths: list[int], again: bool, size: int) -> None:
        self.num_kept += 1
        before = self.history.response(client, f"r{self.num_kept - 1}")
        given = [text(f"m{length % 4}", length) for length in lengths] + (list(before.items) if again and before else [])
        self.history.keep(client, response(f"r{self.num_kept}"), given, [text("made")], size)

    @rule(client=st.sampled_from("abc"), back=st.integers(0, 3))
    def drop(self, client: str, back: int) -> None:
        name = f"r{self.num_kept - back}"
        was_there = self.history.response(client, name) is not None
        assert self.history.drop(client, name) == was_there
        assert self.history.response(client, name) is None

    @rule(seconds=st.integers(0, 6))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @invariant()
    def counts(self) -> None:
        total = 0
        for client in "abc":
            kept = [k for n in range(self.num_kept + 1) if (k := self.history.response(client, f"r{n}")) is not None]
            items = {id(item): item for k in kept for item in k.items}
            num_bytes = sum(k.num_bytes for k in kept) + sum(item.num_bytes for item in items.values())
            assert len(kept) <= 3
            assert num_bytes <= 400
            assert all(self.clock.now - k.kept_at < 10 for k in kept)
            total += num_bytes
        assert self.history.num_bytes == total <= 700


TestKeeping = Keeping.TestCase
TestKeeping.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
