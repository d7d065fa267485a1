"""Who computes what in the next step. No tensors: decisions only, so that they can be tested in microseconds.

There is no prefill phase and no decode phase: a sequence has tokens still to be computed, and the scheduler hands out a budget of
them until there are none. A sequence needs blocks for what it computes: it is admitted when they are to be had, shares those whose
content is there already, and gives way to a more urgent one; what it had computed stays findable until its room is needed.
"""

import heapq
import math
from collections import Counter
from dataclasses import dataclass
from itertools import takewhile

from mlx_manager.inference.engine import prefix
from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS, BlockPool, Content, Digest
from mlx_manager.inference.engine.prefix import PrefixKeys, num_alike
from mlx_manager.inference.engine.sequence import URGENCY, Sequence
from mlx_manager.inference.engine.tails import Tails

_MOST_BEGINNINGS = 32  # of blocks that are compared with what a newcomer goes on with
_FEWEST_ALIKE = 8  # tokens; all prompts of a model begin with a few that are the same


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, stop) of one sequence, to be computed in this step. `samples`: its last token is the last there is, and the one
    that follows is chosen."""

    sequence: Sequence
    start: int
    stop: int
    samples: bool = False


@dataclass(frozen=True, slots=True)
class Fork:
    """`child` has the prompt of `parent`, which is prefilled and about to sample: it takes over what was computed. Where the prompt
    ends within a block, that block's content is copied from `source` to `target`, which the child alone holds."""

    child: Sequence
    parent: Sequence
    source: int | None
    target: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """In this order: `preempted` give up their places; `admitted` come in with `num_computed` of their tokens in blocks already;
    `forks` come in as copies; one forward pass for all of `decode` together, and the chunks of `prefill`, in as few as the cache can."""

    preempted: tuple[Sequence, ...] = ()
    admitted: tuple[Sequence, ...] = ()
    forks: tuple[Fork, ...] = ()
    decode: tuple[Sequence, ...] = ()
    prefill: tuple[Chunk, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.preempted or self.admitted or self.forks or self.decode or self.prefill)


@dataclass(frozen=True, slots=True)
class PassCost:
    """Bytes that a pass over a piece of a prompt takes for each of its tokens, and for each pair of one and a token that it attends to."""

    token_bytes: int
    pair_bytes: int

    def of(self, length: int, start: int) -> int:
        """Of tokens [start, start + length)."""
        return length * (self.token_bytes + (start + length) * self.pair_bytes)


@dataclass(frozen=True, slots=True)
class Policy:
    """`max_sequences` hold places at a time. A class of priority is worth `ageing_s` seconds of waiting.

    `max_row_tokens` bounds (rows) x (tokens of the longest), where rows are padded to one length. `max_scores` bounds (tokens of a
    chunk) x (tokens that it attends to), where attention writes its scores to memory. `needs_states`: layers keep a state beside keys
    and values, so chunks end where blocks end, and a prefix can be resumed only there. The chunks of a step take `max_pass_bytes` at most,
    by what they `cost`. `whole_pictures`: what stands for a picture looks at all of it, so no chunk ends inside one. `samples_prompts`:
    the last chunk of a prompt may be one that samples; otherwise, and where others begin with the very same prompt, that is for the
    decoding step which comes after it. So many `num_tails` are kept of sequences that ended within a block.
    """

    max_sequences: int = 32
    ageing_s: float = 10.0
    max_row_tokens: int | None = None
    max_scores: int | None = None
    needs_states: bool = False
    cost: PassCost | None = None
    max_pass_bytes: int | None = None
    whole_pictures: bool = False
    samples_prompts: bool = False
    num_tails: int = 0


class Scheduler:
    """Waiting and running sequences, and the blocks that they hold."""

    def __init__(self, pool: BlockPool, keys: PrefixKeys, policy: Policy) -> None:
        self.pool = pool
        self.policy = policy
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._keys = keys
        self._tails = Tails(policy.num_tails)
        self._roots: dict[str, Digest] = {}
        self._being_computed: dict[Digest, Sequence] = {}  # blocks of prompts that somebody is at: others wait for them

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def max_tokens(self) -> int:
        """The longest sequence there can be, in tokens."""
        usable = self.pool.num_usable * BLOCK_TOKENS
        if self.policy.max_row_tokens is not None:
            usable = min(usable, self.policy.max_row_tokens // BLOCK_TOKENS * BLOCK_TOKENS)
        if (cost := self.policy.cost) is not None and self.policy.max_pass_bytes is not None:  # or its last piece could not be computed
            usable = min(usable, max(0, self.policy.max_pass_bytes - cost.token_bytes) // cost.pair_bytes)
        return usable

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence wherever it is; what it held can be given away in the next plan. Passes that are queued may still write
        there: they come before whatever the next plan queues."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._let_go(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def expired(self, now: float) -> list[Sequence]:
        """Those whose deadline has passed."""
        return [s for s in (*self.running, *self.waiting) if s.spec.deadline is not None and s.spec.deadline <= now]

    def look_up(self, sequence: Sequence) -> tuple[int, int]:
        """How many tokens of its beginning can be found in blocks, and how many it can go on from."""
        found = self._found(sequence)
        num_usable = self._num_resumable(found)
        return len(found) * BLOCK_TOKENS, num_usable * BLOCK_TOKENS + self._beginning(sequence, num_usable)[0]

    # ---- one step

    def plan(self, now: float, prefill_budget: int) -> Plan:
        """What to do next; blocks are given out as if it were done."""
        preempted: list[Sequence] = []
        self._grow(now, preempted)
        admitted, forks = self._admit(now, self.waiting, preempted)
        prefill = self._hand_out(now, prefill_budget, [s for s in self.running if s.num_prefill_left])
        return Plan(tuple(preempted), tuple(admitted), tuple(forks), tuple(s for s in self.running if s.wants_decode), tuple(prefill))

    def plan_first_tokens(self, now: float, prefill_budget: int, urgency: int) -> Plan:
        """What brings those who are as urgent as that, or more, nearer to a token that needs no row among others: nothing else. Nobody
        overtakes who has waited for so long that it is their turn. Others may be in a step that is not read yet, among them somebody
        whom one of these waits for, and who is as urgent from now on."""
        preempted: list[Sequence] = []
        others = min((self._rank(s, now) for s in self.waiting if s.urgency > urgency), default=(math.inf, math.inf))
        coming = [s for s in self.waiting if s.urgency <= urgency and self._rank(s, now) < others]
        admitted, forks = self._admit(now, coming, preempted)
        starting = [s for s in self.running if s.urgency <= urgency and s.num_computed == s.num_queued <= s.prefill_end]
        prefill = self._hand_out(now, prefill_budget, [s for s in starting if s.num_prefill_left or self._samples(s)])
        return Plan(tuple(preempted), tuple(admitted), tuple(forks), (), tuple(prefill))

    def _grow(self, now: float, preempted: list[Sequence]) -> None:
        """A block for each row whose next token needs one; the least urgent give theirs up if there are none."""
        for sequence in sorted(self.running, key=lambda s: self._rank(s, now)):
            while sequence in self.running and sequence.wants_decode and sequence.num_queued == len(sequence.table) * BLOCK_TOKENS:
                block = self.pool.allocate() if self._rows_fit(len(self.running), len(sequence.table) + 1) else None
                if block is not None:
                    sequence.table.append(block)
                else:
                    self._preempt(max(self.running, key=lambda s: self._rank(s, now)), now, preempted)

    def _admit(self, now: float, candidates: list[Sequence], preempted: list[Sequence]) -> tuple[list[Sequence], list[Fork]]:
        admitted, forks = self._give_places(now, candidates, preempted)
        for sequence in admitted:  # nothing is given away any more: what is found now is there when the plan is carried out
            self._lay_tail(sequence, now)
        return admitted, forks

    def _give_places(self, now: float, candidates: list[Sequence], preempted: list[Sequence]) -> tuple[list[Sequence], list[Fork]]:
        admitted: list[Sequence] = []
        forks: list[Fork] = []
        settled: set[Sequence] = set()  # takes part in what is decided already
        places = Counter(s.spec.client for s in self.running)

        def rank(s: Sequence) -> tuple[float, float]:
            # Whoever has all the places counts as one class less urgent than whoever has none.
            return self._rank(s, now, places[s.spec.client] / self.policy.max_sequences)

        # Of those who were preempted just now the last token may not be read yet.
        left = [(*rank(s), i, s) for i, s in enumerate(candidates) if s not in preempted]
        heapq.heapify(left)
        while left:
            *was, i, candidate = heapq.heappop(left)
            if (current := rank(candidate)) != tuple(was):  # its client has got a place since
                heapq.heappush(left, (*current, i, candidate))
                continue
            leader = self._leader(candidate)
            if leader is not None:
                leader.urgency = min(leader.urgency, candidate.urgency)
                if self.policy.needs_states:
                    leader.parting.add(_num_common_blocks(leader, candidate) * BLOCK_TOKENS)
                continue
            parent = self._parent(candidate)
            hits = self._hits(candidate) if parent is None else parent.table[: parent.prefill_end // BLOCK_TOKENS]
            while not self._has_room(candidate, hits):
                victim = max(self.running, key=lambda s: self._rank(s, now), default=None)
                # One class apart, and by what it is, not by how long it waits: two of one class would take turns at giving way.
                if victim is None or victim in settled or self._rank(victim, now)[0] - candidate.urgency < 1:
                    return admitted, forks
                self._preempt(victim, now, preempted)
                if victim is parent:
                    parent, hits = None, self._hits(candidate)
            self._give_place(candidate, hits, now, is_fork=parent is not None)
            places[candidate.spec.client] += 1
            settled.add(candidate)
            if parent is None:
                admitted.append(candidate)
                self._claim(candidate)
            else:
                forks.append(self._fork(candidate, parent))
                settled.add(parent)
        return admitted, forks

    def _hand_out(self, now: float, budget: int, sequences: list[Sequence]) -> list[Chunk]:
        """The most urgent first."""
        chunks: list[Chunk] = []
        pass_bytes = self.policy.max_pass_bytes
        for sequence in sorted(sequences, key=lambda s: self._rank(s, now)):
            if budget <= 0:
                break
            start = sequence.num_queued
            length = self._chunk_length(sequence, budget, pass_bytes)
            if (cost := self.policy.cost) is not None and pass_bytes is not None:
                pass_bytes -= cost.of(length, start)
                if chunks and pass_bytes < 0:
                    break
            samples = start + length == sequence.prefill_end and self._samples(sequence)
            chunks.append(Chunk(sequence, start, start + length + samples, samples))
            budget -= length
        return chunks

    def _samples(self, sequence: Sequence) -> bool:
        spec = sequence.spec
        if not self.policy.samples_prompts or spec.pictures or spec.sampling.penalises:
            return False
        return not any(other.tokens == sequence.tokens for other in self.waiting)

    def _chunk_length(self, sequence: Sequence, budget: int, pass_bytes: int | None) -> int:
        length = min([budget, sequence.num_prefill_left, *(p - sequence.num_queued for p in sequence.parting if p > sequence.num_queued)])
        if self.policy.max_scores is not None:
            while length > 1 and length * (sequence.num_queued + length) > self.policy.max_scores:
                length //= 2
        if self.policy.cost is not None and pass_bytes is not None:
            while length > 1 and self.policy.cost.of(length, sequence.num_queued) > pass_bytes:
                length //= 2
        if self.policy.needs_states:
            end = sequence.num_queued + length
            aligned = end - end % BLOCK_TOKENS
            if aligned > sequence.num_queued:
                length = aligned - sequence.num_queued
        return self._with_whole_pictures(sequence, length) if self.policy.whole_pictures else length

    def _with_whole_pictures(self, sequence: Sequence, length: int) -> int:
        """A chunk stops before the picture that it would end in; one that begins in it goes on to its end, whatever the budget."""
        start, stop = sequence.num_queued, sequence.num_queued + length
        for placed in sequence.spec.pictures:
            if placed.start < stop < placed.stop:
                return placed.start - start if placed.start > start else min(placed.stop, sequence.prefill_end) - start
        return length

    # ---- who comes before whom

    def _rank(self, sequence: Sequence, now: float, handicap: float = 0.0) -> tuple[float, float]:
        """Less is more urgent."""
        waited = sequence.waited_s + (now - sequence.waiting_since if sequence.waiting_since is not None else 0.0)
        return sequence.urgency - waited / self.policy.ageing_s + handicap, sequence.submitted

    def _leader(self, candidate: Sequence) -> Sequence | None:
        """Who is about to have computed what the candidate would have to compute itself."""
        self._name(candidate)
        for block in range(self._num_shareable(candidate)):
            digest = candidate.digests[block]
            if self.pool.find(digest, prefix.block_tokens(candidate.tokens, block)) is None:
                return self._being_computed.get(digest)
        return next((s for s in self.running if s.num_computed < s.prefill_end and _are_same(s, candidate)), None)

    def _parent(self, candidate: Sequence) -> Sequence | None:
        """Who has just prefilled the very same tokens and not sampled since."""
        for s in self.running:
            if s.num_computed == s.num_queued == s.prefill_end == len(s.tokens) - 1 and _are_same(s, candidate):
                return s
        return None

    # ---- places and blocks

    def _has_room(self, candidate: Sequence, hits: list[int]) -> bool:
        """Blocks for all its tokens, and one more for each who runs already, so that nobody is admitted to be sent away at once."""
        if len(self.running) >= self.policy.max_sequences:
            return False
        num_blocks = _blocks_for(len(candidate.tokens))
        num_hits_cached = sum(self.pool.is_cached(block) for block in hits)
        needed = num_blocks - len(hits) + len(self.running)
        return needed <= self.pool.num_available - num_hits_cached and self._rows_fit(len(self.running) + 1, num_blocks)

    def _rows_fit(self, num_rows: int, num_blocks: int) -> bool:
        if self.policy.max_row_tokens is None:
            return True
        longest = max([num_blocks, *(len(s.table) for s in self.running)])
        return num_rows * longest * BLOCK_TOKENS <= self.policy.max_row_tokens

    def _hits(self, candidate: Sequence) -> list[int]:
        """Blocks that hold the beginning of its tokens. The last token is always left to compute: its logits are wanted."""
        found = self._found(candidate)
        return found[: self._num_resumable(found)]

    def _found(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the beginning of its tokens, resumable or not."""
        self._name(sequence)
        found: list[int] = []
        for index in range(self._num_shareable(sequence)):
            block = self.pool.find(sequence.digests[index], prefix.block_tokens(sequence.tokens, index))
            if block is None:
                break
            found.append(block)
        return found

    def _num_resumable(self, blocks: list[int]) -> int:
        """How many of these, from the first on, a sequence can go on from."""
        contents = (self.pool.content(block) for block in blocks)
        return max((n for n, content in enumerate(contents, 1) if content is not None and content.resumable), default=0)

    def _num_shareable(self, sequence: Sequence) -> int:
        return (len(sequence.tokens) - 1) // BLOCK_TOKENS

    def _name(self, sequence: Sequence) -> None:
        prefix.extend(sequence.digests, sequence.tokens, self._root(sequence))

    def _before(self, sequence: Sequence, block: int) -> Digest:
        """What stands for all that comes before a block of it."""
        return sequence.digests[block - 1] if block else self._root(sequence)

    def _root(self, sequence: Sequence) -> Digest:
        tenant = sequence.spec.tenant
        if tenant not in self._roots:
            self._roots[tenant] = self._keys.root(tenant)
        return self._roots[tenant]

    def _give_place(self, sequence: Sequence, hits: list[int], now: float, *, is_fork: bool) -> None:
        for block in hits:
            self.pool.share(block)
        sequence.table = list(hits)
        while len(sequence.table) < _blocks_for(len(sequence.tokens)):
            block = self.pool.allocate()
            assert block is not None, "there was room"
            sequence.table.append(block)
        sequence.num_queued = sequence.num_computed = len(hits) * BLOCK_TOKENS
        sequence.num_published = len(hits)
        sequence.prefill_end = len(sequence.tokens) - 1
        sequence.tail = None
        if sequence.admitted is None:
            sequence.admitted = now
            sequence.num_cached = sequence.prefill_end if is_fork else sequence.num_computed
        if sequence.waiting_since is not None:
            sequence.waited_s += now - sequence.waiting_since
            sequence.waiting_since = None
        self.waiting.remove(sequence)
        self.running.append(sequence)

    def _lay_tail(self, sequence: Sequence, now: float) -> None:
        """It goes on within a block, if there is a beginning of it to be had."""
        num_common, tail = self._beginning(sequence, sequence.num_published)
        if num_common:
            sequence.tail = tail
            if tail < 0:
                self._tails.use(tail)
            sequence.num_queued = sequence.num_computed = sequence.num_computed + num_common
            if sequence.admitted == now:
                sequence.num_cached += num_common

    def _beginning(self, sequence: Sequence, num_blocks: int) -> tuple[int, int]:
        """How many tokens that follow these blocks can be had from the beginning of another, and its name."""
        if not self.policy.num_tails:
            return 0, 0
        before, start = self._before(sequence, num_blocks), num_blocks * BLOCK_TOKENS
        rest = sequence.tokens[start : min(len(sequence.tokens) - 1, start + BLOCK_TOKENS)]
        beginnings = [*self._tails.after(before), *self.pool.after(before, _MOST_BEGINNINGS)]
        num_common, name = max(((num_alike(tokens, rest), name) for name, tokens in beginnings), default=(0, 0))
        return (num_common, name) if num_common >= _FEWEST_ALIKE else (0, 0)

    def _fork(self, child: Sequence, parent: Sequence) -> Fork:
        child.num_queued = child.num_computed = child.prefill_end
        child.num_published = min(len(child.table), parent.num_published)
        tail = child.prefill_end // BLOCK_TOKENS
        if child.prefill_end % BLOCK_TOKENS == 0:
            return Fork(child, parent, None, None)
        return Fork(child, parent, parent.table[tail], child.table[tail])

    def _preempt(self, victim: Sequence, now: float, preempted: list[Sequence]) -> None:
        """It will be computed again, from what is still findable then."""
        self.running.remove(victim)
        self._let_go(victim)
        victim.num_queued = victim.num_computed = victim.num_published = 0
        victim.waiting_since = now
        self.waiting.append(victim)
        preempted.append(victim)
        self.num_preemptions += 1

    def _let_go(self, sequence: Sequence) -> None:
        # The end first: of a prefix that nobody holds, the end is given away first.
        for block in reversed(sequence.table):
            self.pool.release(block)
        sequence.table = []
        for digest in [d for d, s in self._being_computed.items() if s is sequence]:
            del self._being_computed[digest]

    def _claim(self, sequence: Sequence) -> None:
        for digest in sequence.digests[sequence.num_published : self._num_shareable(sequence)]:
            self._being_computed.setdefault(digest, sequence)

    def publish(self, sequence: Sequence, resumable_at: frozenset[int] = frozenset()) -> list[tuple[int, int]]:
        """Makes the full blocks that have been computed since the last call findable: (index in the table, block) of each that was
        not known before. Where states are needed, only positions of `resumable_at` can be resumed from."""
        new: list[tuple[int, int]] = []
        if not sequence.table:
            return new
        if sequence.num_computed >= sequence.prefill_end:  # nobody waits for it any more
            sequence.urgency = URGENCY[sequence.spec.priority]
        num_full = min(sequence.num_computed, len(sequence.tokens)) // BLOCK_TOKENS
        if num_full > sequence.num_published:
            self._name(sequence)
        for index in range(sequence.num_published, num_full):
            digest = sequence.digests[index]
            content = Content(
                digest,
                self._before(sequence, index),
                prefix.block_tokens(sequence.tokens, index),
                not self.policy.needs_states or (index + 1) * BLOCK_TOKENS in resumable_at,
            )
            if self.pool.publish(sequence.table[index], content):
                new.append((index, sequence.table[index]))
            if self._being_computed.get(digest) is sequence:
                del self._being_computed[digest]
        sequence.num_published = max(sequence.num_published, num_full)
        return new

    def keep_tail(self, sequence: Sequence) -> int | None:
        """What is computed of the last block of a sequence that ends can be found from now on, if it is saved under this name."""
        if not self.policy.num_tails or not sequence.table:
            return None
        num_full, length = divmod(min(sequence.num_computed, len(sequence.tokens)), BLOCK_TOKENS)
        start = num_full * BLOCK_TOKENS
        self._name(sequence)
        return self._tails.put(self._before(sequence, num_full), sequence.tokens[start : start + length])

    def forget_tails(self) -> list[int]:
        """Their names."""
        return self._tails.clear()

    def check_integrity(self) -> None:
        """Every block is accounted for, and everybody has the blocks for what is queued. Raises `AssertionError`."""
        self.pool.check_integrity(s.table for s in self.running)
        for s in self.running:
            assert s.num_computed <= s.num_queued <= len(s.table) * BLOCK_TOKENS, "more was computed than there are blocks for"
            assert s not in self.waiting, "it runs and waits"
        assert not any(s.table for s in self.waiting), "who waits holds nothing"
        assert set(self._being_computed.values()) <= set(self.running), "somebody waits for who does not run"


def _are_same(one: Sequence, other: Sequence) -> bool:
    """Whether both have the same tokens, of which the digests say all but the last few."""
    if len(one.tokens) != len(other.tokens) or one.spec.tenant != other.spec.tenant:
        return False
    num_full = len(one.tokens) // BLOCK_TOKENS
    same_blocks = num_full == 0 or one.digests[num_full - 1] == other.digests[num_full - 1]
    return same_blocks and one.tokens[num_full * BLOCK_TOKENS :] == other.tokens[num_full * BLOCK_TOKENS :]


def _num_common_blocks(one: Sequence, other: Sequence) -> int:
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one.digests, other.digests, strict=False)))


def _blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)
