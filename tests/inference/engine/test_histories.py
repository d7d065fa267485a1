"""Whatever comes, goes, waits and gives way: everybody gets the tokens that they would get alone, and no block is lost or overwritten.

Longer: `.venv/bin/python -m tests.inference.engine.test_histories EXAMPLES [RULES]`, which begins somewhere else every time.
"""

import sys
import zlib
from array import array
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from mlx_manager.core.requests import Priority
from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS, BlockPool, Content
from mlx_manager.inference.engine.prefix import PrefixKeys
from mlx_manager.inference.engine.scheduler import Chunk, Fork, Plan, Policy, Scheduler
from mlx_manager.inference.engine.sequence import EndReason, Sequence, SequenceSpec, TokenSampling

NUM_TOKENS = 60  # in the vocabulary
STOP_TOKENS = frozenset({3, 17, 31})


def next_token(tokens: Iterable[int], seed: int) -> int:
    """The toy model: what comes next depends on every token before."""
    return zlib.crc32(array("i", tokens).tobytes(), seed) % NUM_TOKENS


def alone(spec: SequenceSpec) -> tuple[list[int], EndReason]:
    tokens = list(spec.prompt)
    while len(tokens) < len(spec.prompt) + spec.max_tokens:
        token = next_token(tokens, spec.sampling.seed)
        if token in spec.stop_tokens:
            return tokens[len(spec.prompt) :], "stop"
        tokens.append(token)
    return tokens[len(spec.prompt) :], "length"


@dataclass(frozen=True)
class Row:
    sequence: Sequence
    stay: int
    position: int
    token: int  # sampled


@dataclass
class Pending:
    rows: list[Row] = field(default_factory=list)
    chunks: list[tuple[Chunk, int]] = field(default_factory=list)  # and in which stay
    written: set[tuple[int, int]] = field(default_factory=set)  # (block, slot)


class FakeDevice:
    """A `Runner` whose blocks hold the tokens themselves. Passes happen when they are queued, in that order, as on a device that is one
    step behind; the sequences hear of them when they are read. Keeps also what a cache with rows keeps: copies of what was published,
    and the states at ends of blocks."""

    def __init__(self, pool: BlockPool, *, needs_states: bool) -> None:
        self.pool = pool
        self.needs_states = needs_states
        self.slots: list[list[int | None]] = [[None] * BLOCK_TOKENS for _ in range(pool.num_blocks)]
        self.saved: dict[int, tuple[str, tuple[int, ...]]] = {}  # whose, and all tokens up to there
        self.tails: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.states: dict[int, tuple[int, ...]] = {}  # a recurrent state depends on all tokens so far
        self.seen: dict[Sequence, list[int]] = {}  # the tokens whose keys and values a sequence has, in this stay
        self.stays: dict[Sequence, int] = {}
        self.pending: Pending | None = None
        pool.on_forget = self.drop

    def queue(self, plan: Plan) -> Pending:
        queued = Pending()
        for sequence in plan.preempted:
            self.forget(sequence)
        for sequence in plan.admitted:
            self._admit(sequence)
        for fork in plan.forks:
            self._fork(fork)
        unread = {} if self.pending is None else {row.sequence: row for row in self.pending.rows if not row.sequence.finished}
        for sequence in plan.decode:
            token = unread[sequence].token if sequence in unread else sequence.last_token
            self._write(queued, sequence, sequence.num_queued, token)
        for sequence in plan.decode:
            token = next_token(self._content(sequence, sequence.num_queued + 1), sequence.spec.sampling.seed)
            queued.rows.append(Row(sequence, self.stays[sequence], sequence.num_queued, token))
            sequence.num_queued += 1
            sequence.num_sampled += 1
        for chunk in plan.prefill:
            assert chunk.start == chunk.sequence.num_queued
            for position in range(chunk.start, chunk.stop):
                self._write(queued, chunk.sequence, position, chunk.sequence.tokens[position])
            chunk.sequence.num_queued = chunk.stop
            queued.chunks.append((chunk, self.stays[chunk.sequence]))
            if chunk.samples:
                token = next_token(self._content(chunk.sequence, chunk.stop), chunk.sequence.spec.sampling.seed)
                queued.rows.append(Row(chunk.sequence, self.stays[chunk.sequence], chunk.stop - 1, token))
                chunk.sequence.num_sampled += 1
        self.pending = queued
        return queued

    def read(self, pending: Pending) -> None:
        if self.pending is pending:
            self.pending = None
        for row in pending.rows:
            if row.sequence.table:
                assert row.stay == self.stays[row.sequence], "it left and came back in between"
                row.sequence.num_computed = row.position + 1
        for chunk, stay in pending.chunks:
            if chunk.sequence.table:
                assert stay == self.stays[chunk.sequence], "it left and came back in between"
                chunk.sequence.num_computed = chunk.stop

    def save(self, sequence: Sequence, index: int, block: int, pending: Pending | None) -> None:
        stop = (index + 1) * BLOCK_TOKENS
        if block < 0:
            assert index == sequence.num_computed // BLOCK_TOKENS
            self.tails[block] = sequence.spec.tenant, tuple(sequence.tokens[: sequence.num_computed])
            return
        under_way = set() if self.pending is None else self.pending.written
        assert not any((block, slot) in under_way for slot in range(BLOCK_TOKENS)), "published before it is computed"
        self.saved[block] = sequence.spec.tenant, tuple(sequence.tokens[:stop])
        if pending is not None and any(c.sequence is sequence and c.stop == stop for c, _ in pending.chunks):
            self.states[block] = tuple(sequence.tokens[:stop])

    def drop(self, block: int, content: Content) -> None:
        assert self.saved.pop(block)[1][-BLOCK_TOKENS:] == content.tokens
        self.states.pop(block, None)
        self.slots[block] = [None] * BLOCK_TOKENS

    def forget(self, sequence: Sequence) -> None:
        self.seen.pop(sequence, None)

    def _admit(self, sequence: Sequence) -> None:
        num_hits, in_tail = divmod(sequence.num_computed, BLOCK_TOKENS)
        assert (in_tail > 0) == (sequence.tail is not None)
        assert sequence.num_queued == sequence.num_computed < len(sequence.tokens), "the last token is left to compute"
        hits = sequence.table[:num_hits]
        content = [token for block in hits for token in self.slots[block]]
        if sequence.tail is not None:
            tenant, tokens = (self.tails if sequence.tail < 0 else self.saved)[sequence.tail]
            assert (tenant, tokens[: len(content)]) == (sequence.spec.tenant, tuple(content)), "a tail of something else"
            content += tokens[len(content) : sequence.num_computed]
        assert content == sequence.tokens[: sequence.num_computed], "a hit holds something else"
        for index, block in enumerate(hits):
            assert self.saved[block] == (sequence.spec.tenant, tuple(content[: (index + 1) * BLOCK_TOKENS])), "this is after something else"
        if self.needs_states and hits:
            assert self.states[hits[-1]] == tuple(sequence.tokens[: sequence.num_computed])
        self._begin(sequence, num_hits)
        self.seen[sequence] = sequence.tokens[: sequence.num_computed]
        if in_tail:
            self.slots[sequence.table[num_hits]][:in_tail] = sequence.tokens[num_hits * BLOCK_TOKENS : sequence.num_computed]

    def _fork(self, fork: Fork) -> None:
        child, parent = fork.child, fork.parent
        assert self.seen[parent] == parent.tokens[:-1] == child.tokens[:-1]
        assert (child.tokens, child.spec.tenant) == (parent.tokens, parent.spec.tenant)
        num_shared, in_tail = divmod(child.num_computed, BLOCK_TOKENS)
        self._begin(child, num_shared)
        self.seen[child] = list(self.seen[parent])
        if fork.source is not None and fork.target is not None:
            assert fork.target == child.table[num_shared]
            assert not self.pool.is_shared(fork.target)
            self.slots[fork.target] = list(self.slots[fork.source])
        assert self._content(child, child.num_computed) == child.tokens[:-1]
        assert in_tail == 0 or self.slots[child.table[num_shared]][in_tail:] == [None] * (BLOCK_TOKENS - in_tail)

    def _begin(self, sequence: Sequence, num_hits: int) -> None:
        self.stays[sequence] = self.stays.get(sequence, 0) + 1
        for block in sequence.table[num_hits:]:
            self.slots[block] = [None] * BLOCK_TOKENS  # what nobody can find may hold anything

    def _write(self, queued: Pending, sequence: Sequence, position: int, token: int) -> None:
        index, slot = divmod(position, BLOCK_TOKENS)
        block = sequence.table[index]
        assert not self.pool.is_shared(block), "somebody else reads this"
        assert position == len(self.seen[sequence]), "every token once, in their order"
        if slot == 0:
            self.slots[block] = [None] * BLOCK_TOKENS
        assert self.slots[block][slot] is None, "written twice"
        self.slots[block][slot] = token
        self.seen[sequence].append(token)
        queued.written.add((block, slot))

    def _content(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """What its blocks hold, which is what attention would see."""
        content: list[int | None] = []
        for block in sequence.table[: -(-num_tokens // BLOCK_TOKENS)]:
            content += self.slots[block]
        content = content[:num_tokens]
        known = [token for token in content if token is not None]
        assert len(known) == num_tokens, "read before it is written"
        assert known == self.seen[sequence][:num_tokens]
        return known


# The first two have two blocks in common. The third has the second block of these after another one.
_SHARED = [i % NUM_TOKENS for i in range(2 * BLOCK_TOKENS)]
BEGINNINGS = [
    [*_SHARED, *(5 * i % NUM_TOKENS for i in range(4 * BLOCK_TOKENS))],
    [*_SHARED, *(7 * i % NUM_TOKENS for i in range(4 * BLOCK_TOKENS))],
    [*(9 * i % NUM_TOKENS for i in range(BLOCK_TOKENS)), *_SHARED[BLOCK_TOKENS:], *(11 * i % NUM_TOKENS for i in range(4 * BLOCK_TOKENS))],
]
LENGTHS = st.integers(0, 6 * BLOCK_TOKENS) | st.sampled_from([0, 1, 31, 32, 33, 64, 65, 96, 97, 128, 129]) | st.integers(0, BLOCK_TOKENS)
TAILS = ((), (1,), (2,), (1, 2), (4,) * 20, (5,) * 33)
WHICH_TAIL = st.integers(0, len(TAILS) - 1)
MAX_TOKENS = st.integers(1, 6) | st.integers(40, 120) | st.integers(40, 120)
PRIORITIES: st.SearchStrategy[Priority] = st.sampled_from(["normal", "normal", "low", "high"])


class Histories(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(3, 16),
        max_sequences=st.integers(1, 6) | st.just(6),
        needs_states=st.booleans(),
        max_row_blocks=st.none() | st.integers(2, 24),
        max_scores=st.none() | st.sampled_from([2_000, 20_000]),
        step_s=st.sampled_from([0.01, 1.0, 8.0]),
        ahead=st.sampled_from([True, True, False]),
        samples_prompts=st.booleans(),
        num_tails=st.sampled_from([0, 0, 2]),
    )
    def start(
        self,
        num_blocks: int,
        max_sequences: int,
        needs_states: bool,
        max_row_blocks: int | None,
        max_scores: int | None,
        step_s: float,
        ahead: bool,
        samples_prompts: bool,
        num_tails: int,
    ) -> None:
        max_row_tokens = None if max_row_blocks is None else max_row_blocks * BLOCK_TOKENS
        self.policy = Policy(
            max_sequences,
            10.0,
            max_row_tokens,
            max_scores,
            needs_states,
            samples_prompts=samples_prompts and not needs_states,
            num_tails=0 if needs_states else num_tails,
        )
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(self.pool, PrefixKeys("toy", "tokens"), self.policy)
        self.device = FakeDevice(self.pool, needs_states=needs_states)
        self.pending: Pending | None = None
        self.now = 0.0
        self.step_s = step_s
        self.ahead = ahead  # a step is queued before the one before is read
        self.live: list[Sequence] = []
        self.ended: list[Sequence] = []

    # ---- what happens

    @rule(
        beginning=st.integers(0, len(BEGINNINGS) - 1),
        length=LENGTHS,
        tail=WHICH_TAIL,
        seeds=st.lists(st.integers(0, 1), min_size=1, max_size=4),
        max_tokens=MAX_TOKENS,
        stops=st.booleans(),
        priority=PRIORITIES,
        client=st.sampled_from("ab"),
        tenant=st.sampled_from(["", "", "", "other"]),
        patience_s=st.none() | st.none() | st.sampled_from([0.05, 5.0]),
    )
    def submit(
        self,
        beginning: int,
        length: int,
        tail: int,
        seeds: list[int],
        max_tokens: int,
        stops: bool,
        priority: Priority,
        client: str,
        tenant: str,
        patience_s: float | None,
    ) -> None:
        self._submit([*BEGINNINGS[beginning][:length], *TAILS[tail]] or [1], seeds, max_tokens, stops, priority, client, tenant, patience_s)

    @precondition(lambda self: self.ended)
    @rule(which=st.integers(0, 99), tail=WHICH_TAIL, max_tokens=MAX_TOKENS, seed=st.integers(0, 1))
    def go_on_with_a_conversation(self, which: int, tail: int, max_tokens: int, seed: int) -> None:
        before = self.ended[which % len(self.ended)]
        self._submit([*before.tokens, *TAILS[tail]], [seed], max_tokens, False, "normal", before.spec.client, before.spec.tenant, None)

    @precondition(lambda self: self.has_work)
    @rule(times=st.integers(1, 5), budget=st.sampled_from([1, 20, 32, 33, 64, 200]))
    def step(self, times: int, budget: int) -> None:
        self._advance_by(times, budget)

    @precondition(lambda self: self.has_work)
    @rule(times=st.integers(10, 60), budget=st.sampled_from([20, 64, 200]))
    def step_for_a_while(self, times: int, budget: int) -> None:
        self._advance_by(times, budget)

    @precondition(lambda self: self.has_work and not self.ahead)
    @rule(
        budget=st.sampled_from([1, 20, 32, 33, 64, 200]),
        beginning=st.integers(0, len(BEGINNINGS) - 1),
        length=LENGTHS,
        tail=WHICH_TAIL,
        seeds=st.lists(st.integers(0, 1), min_size=1, max_size=3),
        max_tokens=MAX_TOKENS,
        priority=PRIORITIES,
    )
    def step_in_which_somebody_comes(
        self, budget: int, beginning: int, length: int, tail: int, seeds: list[int], max_tokens: int, priority: Priority
    ) -> None:
        prompt = [*BEGINNINGS[beginning][:length], *TAILS[tail]] or [1]
        self._advance(budget, lambda: self._submit(prompt, seeds, max_tokens, True, priority, "a", "", None))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        self._drop(self.live[which % len(self.live)])

    @precondition(lambda self: self.pool.num_cached)
    @rule(num_blocks=st.integers(1, 6))
    def evict(self, num_blocks: int) -> None:
        expected = min(num_blocks, self.pool.num_cached)
        assert self.pool.evict(num_blocks) == expected

    # ---- what always holds

    @invariant()
    def the_books_are_right(self) -> None:
        self.scheduler.check_integrity()
        assert {*self.scheduler.running, *self.scheduler.waiting} == set(self.live)

    @invariant()
    def whatever_can_be_found_holds_what_it_says(self) -> None:
        contents = self.pool.cached_contents()
        for block, content in contents:
            assert self.device.slots[block] == list(content.tokens)
        assert {block for block, _ in contents} == set(self.device.saved)
        if self.policy.needs_states:
            assert {block for block, content in contents if content.resumable} == set(self.device.states)

    def teardown(self) -> None:
        if sys.exception() is not None:  # something went wrong already
            return
        most_steps = 2 * sum(self._most_steps_alone(s, budget=32) for s in self.live) + 10
        self._advance_by(most_steps, budget=32)
        assert not self.has_work, f"{len(self.live)} are not served after {most_steps} steps"
        assert self.pool.num_held == 0
        self.whatever_can_be_found_holds_what_it_says()

    def _most_steps_alone(self, sequence: Sequence, budget: int) -> int:
        num_tokens = len(sequence.spec.prompt) + sequence.spec.max_tokens
        if self.policy.max_scores is not None:
            budget = max(1, min(budget, self.policy.max_scores // (2 * num_tokens)))
        return -(-num_tokens // budget) + sequence.spec.max_tokens + 5

    # ---- as in the engine

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.pending is not None

    def _submit(
        self,
        prompt: list[int],
        seeds: Items[int],
        max_tokens: int,
        stops: bool,
        priority: Priority,
        client: str,
        tenant: str,
        patience_s: float | None,
    ) -> None:
        room = self.scheduler.max_tokens
        prompt = prompt[: room - 1]
        for index, seed in enumerate(seeds):
            spec = SequenceSpec(
                tuple(prompt),
                min(max_tokens, room - len(prompt)),
                TokenSampling(seed),
                STOP_TOKENS if stops else frozenset(),
                priority=priority,
                client=client,
                tenant=tenant,
                deadline=None if patience_s is None else self.now + patience_s,
            )
            sequence = Sequence(spec, index)
            sequence.submitted = sequence.waiting_since = self.now
            self.live.append(sequence)
            self.scheduler.add(sequence)

    def _advance_by(self, times: int, budget: int) -> None:
        for _ in range(times):
            if self.has_work:
                self._advance(budget)

    def _advance(self, budget: int, while_computing: Callable[[], None] | None = None) -> None:
        self.now += self.step_s
        for sequence in self.scheduler.expired(self.now):
            self._drop(sequence)
        plan = self.scheduler.plan(self.now, budget)
        self._check(plan, budget)
        queued = None if plan.is_empty else self.device.queue(plan)
        if self.ahead:
            pending, self.pending = self.pending, queued
        else:
            pending = queued
            if queued is not None and while_computing is not None:
                while_computing()
                under_way = {*(row.sequence for row in queued.rows), *(chunk.sequence for chunk, _ in queued.chunks)}
                while under_way and self._hurry(budget, under_way):
                    pass
        if pending is not None:
            self._read(pending)

    def _hurry(self, budget: int, under_way: set[Sequence]) -> bool:
        urgency = min(s.urgency for s in under_way)
        most = min((s.urgency for s in self.live if s not in under_way), default=urgency)
        if most >= urgency:
            return False
        plan = self.scheduler.plan_first_tokens(self.now, budget, most)
        self._check_chunks(plan, budget)
        assert not plan.decode
        coming = {*plan.admitted, *(chunk.sequence for chunk in plan.prefill)}
        assert all(s.urgency < urgency for s in coming)
        assert not coming & under_way, "the end of its prompt before the middle"
        if not plan.is_empty:
            self._read(self.device.queue(plan))
        return not plan.is_empty

    def _check(self, plan: Plan, budget: int) -> None:
        running, policy = self.scheduler.running, self.policy
        assert len(running) <= policy.max_sequences
        assert all(s.num_cached < len(s.spec.prompt) for s in running)
        if policy.max_row_tokens is not None:
            longest = max((len(s.table) for s in running), default=0)
            assert len(running) * longest * BLOCK_TOKENS <= policy.max_row_tokens
        self._check_chunks(plan, budget)
        under_way = set() if self.pending is None else {chunk.sequence for chunk, _ in self.pending.chunks if not chunk.samples}
        assert not under_way & set(plan.decode), "decoded before its prefill has been read"
        assert not {chunk.sequence for chunk in plan.prefill} & set(plan.decode)
        assert all(chunk.start < chunk.sequence.prefill_end for chunk in plan.prefill), "what is left decodes"
        if plan.is_empty:  # nobody would hear of it
            assert not plan.admitted
            assert not plan.forks
            assert self.pending is not None or not running, "everybody waits for nothing"

    def _check_chunks(self, plan: Plan, budget: int) -> None:
        policy = self.policy
        assert sum(chunk.stop - chunk.start - chunk.samples for chunk in plan.prefill) <= budget
        for chunk in plan.prefill:
            length = chunk.stop - chunk.start - chunk.samples
            assert chunk.start < chunk.stop
            if chunk.samples:
                assert policy.samples_prompts
                assert chunk.stop == chunk.sequence.prefill_end + 1 == len(chunk.sequence.tokens)
            else:
                assert chunk.stop <= chunk.sequence.prefill_end < len(chunk.sequence.tokens)
            if policy.max_scores is not None:
                assert length <= 1 or length * (chunk.stop - chunk.samples) <= policy.max_scores
            if policy.needs_states:
                assert chunk.stop % BLOCK_TOKENS == 0 or chunk.stop // BLOCK_TOKENS == chunk.start // BLOCK_TOKENS

    def _read(self, pending: Pending) -> None:
        self.device.read(pending)
        for row in pending.rows:
            if not row.sequence.finished:
                self._take(row.sequence, row.token)
        for sequence in dict.fromkeys([*(chunk.sequence for chunk, _ in pending.chunks), *(row.sequence for row in pending.rows)]):
            self._publish(sequence, pending)

    def _take(self, sequence: Sequence, token: int) -> None:
        reason: EndReason | None = "stop" if token in sequence.spec.stop_tokens else None
        if reason is None:
            sequence.tokens.append(token)
            if sequence.num_generated == sequence.spec.max_tokens:
                reason = "length"
        if reason is not None:
            assert (sequence.generated, reason) == alone(sequence.spec)
            self._publish(sequence, None)
            if (tail := self.scheduler.keep_tail(sequence)) is not None:
                self.device.save(sequence, sequence.num_computed // BLOCK_TOKENS, tail, None)
            self._drop(sequence)
            self.ended.append(sequence)

    def _publish(self, sequence: Sequence, pending: Pending | None) -> None:
        chunks = () if pending is None else pending.chunks
        ends = frozenset(chunk.stop for chunk, _ in chunks if chunk.sequence is sequence)
        for index, block in self.scheduler.publish(sequence, ends):
            self.device.save(sequence, index, block, pending)

    def _drop(self, sequence: Sequence) -> None:
        sequence.finished = True
        self.live.remove(sequence)
        self.scheduler.remove(sequence)
        self.device.forget(sequence)


def long(max_examples: int, num_rules: int, *, derandomize: bool) -> settings:
    return settings(
        max_examples=max_examples,
        stateful_step_count=num_rules,
        derandomize=derandomize,
        deadline=None,
        phases=[phase for phase in Phase if phase is not Phase.explain],  # which takes minutes here
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


TestHistories = Histories.TestCase
TestHistories.settings = long(200, 50, derandomize=True)

if __name__ == "__main__":
    run_state_machine_as_test(Histories, settings=long(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 50, derandomize=False))
