"""One model's continuous batching: take submissions → plan → run → deliver, one turn at a time on the device thread."""

import asyncio
import logging
import queue
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from mlx_manager.core.errors import EngineFault, InvalidField, PromptTooLarge, TimedOut
from mlx_manager.core.events import Timing
from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS, Content, Digest
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.disk_tier import DiskCounters, DiskTier, StoredBlock
from mlx_manager.inference.engine.explain import Explanation, RecentTokens, explain
from mlx_manager.inference.engine.pace import Pace
from mlx_manager.inference.engine.prefix import block_tokens
from mlx_manager.inference.engine.scheduler import Chunk, Plan, Scheduler
from mlx_manager.inference.engine.sequence import URGENCY, Ended, EndReason, Sequence, SequenceSpec, Token

log = logging.getLogger(__name__)

Item = Token | Ended | EngineFault | TimedOut | InvalidField


class PendingStep(Protocol):
    """A step that is queued: its rows (None: nobody wants what comes of it), the chunks of prompts in it, and who gets a token from it:
    the rows, then those whose prompts end in it with a chunk that samples."""

    @property
    def rows(self) -> tuple[Sequence | None, ...]: ...
    @property
    def sampling(self) -> tuple[Sequence | None, ...]: ...
    @property
    def chunks(self) -> tuple[tuple[Chunk, Any], ...]: ...


class ForwardPasses(Protocol):
    """What the engine needs of a `Runner`. What `queue` returns comes back to `read` and `save`, untouched."""

    @property
    def cache_name(self) -> str: ...
    @property
    def takes_pictures(self) -> bool: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def allocated_bytes(self) -> int: ...
    @property
    def host_bytes(self) -> int: ...
    @property
    def state_bytes(self) -> int: ...

    def queue(self, plan: Plan, unread: Any = None) -> PendingStep: ...
    def start(self, pending: Any) -> None: ...
    def compute(self, pending: Any) -> Iterator[None]: ...
    def finish(self, pending: Any) -> None: ...
    def read(self, pending: Any) -> list[Token | None]: ...
    def save(self, sequence: Sequence, index: int, block: int, pending: Any) -> None: ...
    def drop(self, block: int) -> None: ...
    def export(self, block: int) -> Mapping[str, np.ndarray] | None: ...
    def load(self, block: int, arrays: Mapping[str, np.ndarray]) -> bool: ...
    def forget(self, sequence: Sequence) -> None: ...
    def clear(self) -> None: ...


@dataclass(slots=True)
class Counters:
    """What the engine has done since it started; written on the device thread, read anywhere. The last token of a prompt counts as one
    that is decoded."""

    decode_steps: int = 0
    decoded_tokens: int = 0
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    fetched_blocks: int = 0
    faults: int = 0


class TokenStream(AsyncIterator[Token | Ended]):
    """The tokens of one submission, on the event loop that asked for them. Ends after the `Ended` of every sequence;
    raises `EngineFault` if the engine failed, `TimedOut` past a deadline, `InvalidField` for a form that proves too complex. Closing it
    early cancels what still runs."""

    def __init__(self, engine: "Engine", sequences: tuple[Sequence, ...]) -> None:
        self._engine = engine
        self.loop = asyncio.get_running_loop()
        self._items: deque[Item] = deque()
        self._arrived = asyncio.Event()
        self._sequences = sequences
        self._running = {s.index: s for s in sequences}

    async def __anext__(self) -> Token | Ended:
        while not self._items:
            if not self._running:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        item = self._items.popleft()
        if isinstance(item, InvalidField):
            self._running.clear()
            raise item
        if isinstance(item, EngineFault | TimedOut):
            self._running.clear()
            raise type(item)(item.message) from item.__cause__  # one of its own: others may be told of the same fault
        if isinstance(item, Ended):
            self._running.pop(item.index, None)
        return item

    def num_cached(self, index: int) -> int:
        """Tokens of a sequence's prompt that had their keys and values already when it was admitted; 0 before that."""
        return self._sequences[index].num_cached

    def timing(self, index: int) -> Timing:
        """When a sequence got through each stage so far."""
        return self._sequences[index].timing()

    def cancel(self, index: int) -> None:
        """Stops one sequence: its tokens that are on their way still come, its `Ended` does not."""
        sequence = self._running.pop(index, None)
        if sequence is not None:
            self._engine.cancel(sequence)

    def close(self) -> None:
        for index in list(self._running):
            self.cancel(index)

    def deliver(self, item: Item) -> None:
        """On the event loop."""
        self._items.append(item)
        self._arrived.set()


Delivery = tuple[TokenStream, Item]


class Mailbox:
    """What is on its way to one event loop. The loop is woken once for all that has come until it looks: woken at every step, it would
    never see the end of its wake-ups where steps are short."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[Delivery] = deque()
        self._has_woken = False

    def put(self, deliveries: list[Delivery]) -> None:
        """From any thread. Raises `RuntimeError` if the loop is closed."""
        self._items.extend(deliveries)
        if not self._has_woken:
            self._has_woken = True
            self._loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._has_woken = False  # before looking: what comes from now on wakes again
        while self._items:
            stream, item = self._items.popleft()
            stream.deliver(item)


# Passes in a row that are for urgent prompts alone.
_MOST_HURRIED = 8
# How often a pass stands still.
_MOST_STOPS = 2
# After somebody urgent has come, others are expected for so long.
_EXPECTED_S = 60.0
# Of a plain SSD, so that nothing is read that is computed sooner.
_DISK_BYTES_PER_S = 500e6


@dataclass(slots=True)
class Fetched:
    """Block `index` of a sequence, asked of the disk; `block` stays None if it was not there after all."""

    index: int
    digest: Digest
    block: StoredBlock | None = None
    has_come: bool = False


@dataclass(frozen=True, slots=True)
class CacheState:
    """How a model keeps keys and values: the `kind` of cache, its blocks (held by sequences, or only kept for others), and the bytes that
    are allocated for all of it, `host_bytes` of which MLX does not know of."""

    kind: str
    block_bytes: int
    num_blocks: int
    num_held: int
    num_cached: int
    num_evictions: int
    num_preemptions: int
    allocated_bytes: int
    host_bytes: int
    disk: DiskCounters | None


class Engine:
    """Submissions come from an event loop; everything else happens on the device thread.

    One step ahead: step N + 1 is queued before the tokens of step N are read, so the device does not wait for the host; unless somebody
    would have to wait for it who is more urgent. A sequence that turns out to have ended at N has a surplus token in N + 1, which is
    dropped. Where the device is the CPU there is nothing to overlap (queueing a step takes as long as computing it), and tokens would
    only come a step later: a step is read at once, and stands still, between two layers, while the prompt of somebody more urgent is
    computed.
    """

    def __init__(
        self,
        device: Device,
        runner: ForwardPasses,
        scheduler: Scheduler,
        pace: Pace,
        *,
        ahead: bool = True,
        max_state_bytes: int = 1 << 30,
        disk: DiskTier | None = None,
        check_every: int = 0,
    ) -> None:
        """`ahead`: a step is queued before the one before is read; see the class. `max_state_bytes` is for states that blocks stand
        for, beside keys and values. `disk` has been started; the engine stops it. The books are checked every `check_every` steps;
        0: never."""
        self._device = device
        self._runner = runner
        self._scheduler = scheduler
        self._pace = pace
        self._ahead = ahead
        self._max_state_bytes = max_state_bytes
        self._disk = disk
        self._check_every = check_every
        self._recent = RecentTokens()
        self._deliveries: list[Delivery] = []  # read and not handed over yet
        self._fetching: dict[Sequence, list[Fetched]] = {}  # who waits for blocks from the disk, with those that have come
        self._streams: dict[Sequence, TokenStream] = {}
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}
        self._pending: PendingStep | None = None
        self._num_hurried = 0
        self._has_prefilled = False  # in the turn before
        self._arrivals: queue.SimpleQueue[tuple[tuple[Sequence, ...], TokenStream]] = queue.SimpleQueue()
        self._last_came: dict[int, float] = {}  # when somebody of each urgency did
        self._queued_at: float | None = 0.0  # when the pending step was queued; None: it did not have the device to itself
        self._read_at = 0.0  # when the step before had been read: the device began with the pending one then, or when it was queued
        self._note_memory()
        self.counters = Counters()
        scheduler.pool.on_forget = self._forget_block

    # ---- from an event loop

    def submit(self, specs: Items[SequenceSpec]) -> TokenStream:
        """Starts work on `specs`; the items of the stream say by `index` which they belong to.
        Raises `PromptTooLarge` if a prompt does not fit the blocks that there are; a reply is cut where they end."""
        room = self._scheduler.max_tokens
        for spec in specs:
            if len(spec.prompt) >= room:
                raise PromptTooLarge(tokens=len(spec.prompt), limit=room - 1)
        sequences = tuple(
            Sequence(replace(spec, max_tokens=min(spec.max_tokens, room - len(spec.prompt))), index) for index, spec in enumerate(specs)
        )
        stream = TokenStream(self, sequences)
        self._arrivals.put((sequences, stream))
        if not self._device.post(self._let_in):
            stream.deliver(EngineFault("The server is shutting down."))
        return stream

    def cancel(self, sequence: Sequence) -> None:
        self._device.post(lambda: self._drop(sequence))

    def abort(self, fault: EngineFault) -> None:
        """Ends every sequence, its stream with `fault`."""
        self._device.post(lambda: self._hand_over(self._fail_all(fault)))

    @property
    def takes_pictures(self) -> bool:
        return self._runner.takes_pictures

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting) + len(self._fetching)

    @property
    def cache_state(self) -> CacheState:
        """How keys and values are kept, and how full it is."""
        pool = self._scheduler.pool
        return CacheState(
            kind=self._runner.cache_name,
            block_bytes=self._runner.block_bytes,
            num_blocks=pool.num_usable,
            num_held=pool.num_held,
            num_cached=pool.num_cached,
            num_evictions=pool.num_evictions,
            num_preemptions=self._scheduler.num_preemptions,
            allocated_bytes=self._allocated_bytes,
            host_bytes=self._host_bytes,
            disk=None if self._disk is None else self._disk.counters,
        )

    def limit_pass(self, num_tokens: int) -> None:
        """So many prompt tokens a step at most. From any thread."""

        def limit() -> None:
            self._pace.max_budget = num_tokens

        self._device.post(limit)

    def drop_prefixes(self) -> None:
        """Frees the blocks that nobody holds. From any thread."""

        def drop() -> None:
            pool = self._scheduler.pool
            pool.evict(pool.num_cached)
            for tail in self._scheduler.forget_tails():
                self._runner.drop(tail)
            self._note_memory()

        self._device.post(drop)

    async def explain(self, spec: SequenceSpec) -> Explanation:
        """How much of a prompt is there already, and why not more. Raises `EngineFault` once the device has stopped."""

        def look() -> Explanation:
            sequence = Sequence(spec, 0)
            num_found, num_cached = self._scheduler.look_up(sequence)
            return explain(
                spec.prompt,
                num_cached=num_cached,
                num_found=num_found,
                num_on_disk=len(self._on_disk(sequence, num_found // BLOCK_TOKENS)) * BLOCK_TOKENS,
                recent=self._recent.of(spec.tenant),
                running=[s.tokens for s in self._scheduler.running if s.spec.tenant == spec.tenant],
            )

        return await self._device.run(look)

    # ---- on the device thread

    def close(self) -> DiskTier | None:
        """The end. What can be found is queued for the disk, if there is one, the most recently used first, as far as its queue goes;
        whoever calls this stops the disk, on another thread, since it may take its time to write."""
        if self._disk is not None:
            for block, content in reversed(self._scheduler.pool.cached_contents()):
                self._spill(block, content)
        self._scheduler.pool.forget_nothing()  # or each of us would keep the other
        return self._disk

    def check_integrity(self) -> None:
        """Raises `AssertionError` if a block is lost, held twice or written by who should not."""
        self._scheduler.check_integrity()

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self._pending is not None

    def step(self) -> None:
        """One turn. A fault fails what is under way; the engine goes on."""
        try:
            self._advance()
        except Exception as error:
            log.exception("the engine failed; the requests it was serving are told")
            self.counters.faults += 1
            fault = EngineFault("The engine failed while it was working on this request.")
            fault.__cause__ = error
            self._deliveries += self._fail_all(fault)
        self._note_memory()
        if self._ahead or not self.has_work:
            self.flush()

    def flush(self) -> None:
        """Hands over what has been read. Between two steps that are read at once it waits until the second is described: until then this
        thread and the event loop's would only wait for each other."""
        deliveries, self._deliveries = self._deliveries, []
        self._hand_over(deliveries)

    def _note_memory(self) -> None:
        """For whoever asks on another thread."""
        self._allocated_bytes = self._runner.allocated_bytes
        self._host_bytes = self._runner.host_bytes

    def _let_in(self) -> None:
        """Who has come since. Before a turn, or in the midst of one."""
        while not self._arrivals.empty():
            sequences, stream = self._arrivals.get()
            for sequence in sequences:
                self._last_came[sequence.urgency] = sequence.submitted
                self._streams[sequence] = stream
                if not self._fetch(sequence):
                    self._scheduler.add(sequence)

    def _advance(self) -> None:
        now = time.monotonic()
        for sequence in self._scheduler.expired(now):
            if stream := self._streams.get(sequence):
                self._deliveries.append((stream, TimedOut("The request took longer than it may.")))
                self._drop_stream(stream)
        if self._ahead:
            self._overlap()
        else:
            self._in_turn()
        if self._pending is None and not self._scheduler.running:
            self._runner.clear()

    def _overlap(self) -> None:
        """Queues a step, then reads the one before; the other way round where it is awaited."""
        if self._pending is not None and self._is_awaited(self._pending):
            awaited, self._pending = self._pending, None
            self._read(awaited)
            self.flush()
            self._let_in()  # whoever came meanwhile may be the one
            if self._hurry(self._urgency_of_others()):
                return
        plan = self._plan(self._budget())
        queued_at = time.monotonic()
        queued = None if plan.is_empty else self._runner.queue(plan, self._pending)
        if queued is not None:
            self._runner.start(queued)
        pending, self._pending = self._pending, queued
        if pending is not None:
            self._read(pending)
        if queued is not None:
            self._runner.finish(queued)
        self._queued_at = queued_at

    def _in_turn(self) -> None:
        """Computes prompts and decodes, a pass a turn."""
        urgency = self._urgency_of_others()
        if self._hurry(urgency):
            return
        self._num_hurried = 0
        # Who needs a row for a first token, and is more urgent than the others, does not wait for their prompts.
        needs_row = any(s.first_token is None and s.wants_decode and s.urgency < urgency for s in self._scheduler.running)
        plan = self._plan(0 if needs_row or self._has_prefilled else self._usual_budget())
        self._has_prefilled = bool(plan.prefill)
        if plan.prefill:
            plan = replace(plan, decode=())
        if not plan.is_empty:
            self._run(plan)

    def _urgency_of_others(self) -> int:
        """Who is more urgent than that does not wait for others: for those who decode, or, where nobody does, for the prompts of the least
        urgent."""
        decoding = [s.urgency for s in self._decoding()]
        return min(decoding) if decoding else max((s.urgency for s in self._starting()), default=0)

    def _hurry(self, urgency: int) -> bool:
        """A pass for the first tokens of the most urgent, if they are more urgent than that."""
        urgent = self._more_urgent(urgency)
        if urgent is None:
            return False
        most, num_tokens = urgent
        plan = self._scheduler.plan_first_tokens(time.monotonic(), max(1, num_tokens), most)
        if plan.is_empty:
            return False
        self._num_hurried += 1
        self._count(plan)
        self._run(plan)
        return True

    def _run(self, plan: Plan) -> None:
        queued = self._runner.queue(plan)
        self.flush()
        self._queued_at = time.monotonic()
        under_way = [*(s for s in queued.rows if s is not None), *(chunk.sequence for chunk, _ in queued.chunks)]
        urgency = min((s.urgency for s in under_way), default=0)
        if not self._ahead and self._expects(urgency):
            self._compute(queued, urgency)
        else:
            self._runner.start(queued)
        self._read(queued)

    def _compute(self, queued: PendingStep, urgency: int) -> None:
        """Layer by layer, for those who are more urgent than that. A few times at most: who gave up or ran out of time is looked for
        between turns, and other engines have theirs."""
        num_stops = 0
        for _ in self._runner.compute(queued):
            self._let_in()
            if num_stops < _MOST_STOPS and self._hurry(urgency):
                num_stops += 1
                self.flush()
                self._queued_at = None

    def _expects(self, urgency: int) -> bool:
        """Whether somebody more urgent than that is likely to come. To stop for them between layers costs a tenth of the step."""
        now = time.monotonic()
        return any(now - at < _EXPECTED_S for other, at in self._last_came.items() if other < urgency)

    def _plan(self, budget: int) -> Plan:
        plan = self._scheduler.plan(time.monotonic(), budget)
        self._count(plan)
        return plan

    def _count(self, plan: Plan) -> None:
        self.counters.prefilled_tokens += sum(chunk.stop - chunk.start - chunk.samples for chunk in plan.prefill)
        self.counters.cached_tokens += sum(s.num_computed for s in plan.admitted) + sum(f.child.num_computed for f in plan.forks)

    def _budget(self) -> int:
        """Prompt tokens for the next step. Where somebody waits for a first token who is more urgent than all who decode, it is for that
        prompt alone: what others would have computed beside it is what it would wait for."""
        decoding = self._decoding()
        urgent = self._more_urgent(min(s.urgency for s in decoding)) if decoding else None
        self._num_hurried = 0 if urgent is None else self._num_hurried + 1
        return self._usual_budget() if urgent is None else urgent[1]

    def _more_urgent(self, urgency: int) -> tuple[int, int] | None:
        """How urgent the most urgent are who wait for a first token, if more than that, and how many tokens of their prompts a pass may
        compute. Now and then others get on all the same."""
        starting = self._starting()
        most = min((s.urgency for s in starting), default=urgency)
        if most >= urgency or self._num_hurried >= _MOST_HURRIED:
            return None
        return most, min(self._pace.max_budget, sum(s.num_prefill_left for s in starting if s.urgency == most))

    def _usual_budget(self) -> int:
        starting = self._starting()
        in_background = all(s.urgency == URGENCY["low"] for s in starting)
        return self._pace.budget(num_decoding=len(self._decoding()), num_prefilling=len(starting), in_background=in_background)

    def _starting(self) -> list[Sequence]:
        """Those who wait for a first token, and may get a place."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        starting = [s for s in running if s.first_token is None or s.num_prefill_left]
        if len(running) < self._scheduler.policy.max_sequences:
            return starting + waiting
        least = max(s.urgency for s in running)
        return starting + [s for s in waiting if s.urgency < least]

    def _decoding(self) -> list[Sequence]:
        return [s for s in self._scheduler.running if s.wants_decode and s.first_token is not None]

    def _is_awaited(self, pending: PendingStep) -> bool:
        """Whether a step is read before the next one is planned: it completes the prompt of somebody more urgent than all who decode, or
        somebody more urgent than all in it is likely to come before its end, since a step that is queued behind another can only be
        waited for; or nobody decodes, and first tokens are all that there is to wait for."""
        rows = [s.urgency for s in pending.rows if s is not None]
        if not rows:
            reading = [chunk.sequence.urgency for chunk, _ in pending.chunks]
            return any(chunk.samples for chunk, _ in pending.chunks) or (bool(reading) and self._expects(min(reading)))
        done = [c.sequence.urgency for c, _ in pending.chunks if c.stop >= c.sequence.prefill_end]
        return min(done, default=min(rows)) < min(rows) or self._expects(min(rows))

    def _read(self, pending: PendingStep) -> None:
        tokens = self._runner.read(pending)
        self._note_time(pending)
        self.counters.decode_steps += bool(pending.rows)
        # First tokens first: in a large batch the last to be handed over waits for all others.
        made, num_rows = list(zip(pending.sampling, tokens, strict=True)), len(pending.rows)
        for sequence, token in made[num_rows:] + made[:num_rows]:
            if sequence is not None and token is not None and not sequence.finished:  # else its surplus token
                self._take(sequence, token)
        for sequence in dict.fromkeys([*(chunk.sequence for chunk, _ in pending.chunks), *(s for s in pending.rows if s is not None)]):
            self._publish(sequence, pending)
        if self._check_every and self.counters.decode_steps % self._check_every == 0:
            self.check_integrity()

    def _take(self, sequence: Sequence, token: Token) -> None:
        stream = self._streams[sequence]
        reason: EndReason | None = "stop" if token.token in sequence.spec.stop_tokens else None
        if reason is None:
            if sequence.first_token is None:
                sequence.first_token = time.monotonic()
            sequence.tokens.append(token.token)
            self.counters.decoded_tokens += 1
            self._deliveries.append((stream, token))
            constraint = sequence.spec.constraint
            if constraint is not None and not constraint.accept(token.token):
                why = f"Invalid '{constraint.field}': it proves too complex to be kept to beyond what has been said."
                self._deliveries.append((stream, InvalidField(why, param=constraint.field)))
                self._drop_stream(stream)
                return
            if constraint is not None and constraint.is_complete:
                reason = "stop"
            elif sequence.num_generated == sequence.spec.max_tokens:
                reason = "length"
        if reason is not None:
            # What it has computed stays findable: the next turn of a conversation begins with it.
            self._publish(sequence, None)
            if (tail := self._scheduler.keep_tail(sequence)) is not None:
                self._runner.save(sequence, sequence.num_computed // BLOCK_TOKENS, tail, None)
            self._drop(sequence)
            self._deliveries.append((stream, Ended(sequence.index, reason, sequence.timing())))

    def _publish(self, sequence: Sequence, pending: PendingStep | None) -> None:
        chunks = () if pending is None else pending.chunks
        ends = frozenset(chunk.stop for chunk, _ in chunks if chunk.sequence is sequence)
        published = self._scheduler.publish(sequence, ends)
        for index, block in published:
            self._runner.save(sequence, index, block, pending)
        if published and self._scheduler.policy.needs_states:
            while self._runner.state_bytes > self._max_state_bytes and self._scheduler.pool.evict_resumable():
                pass

    def _note_time(self, pending: PendingStep) -> None:
        now = time.monotonic()
        num_prefilled = sum(chunk.stop - chunk.start for chunk, _ in pending.chunks)
        if self._queued_at is not None and (pending.rows or pending.chunks):
            self._pace.observe(now - max(self._queued_at, self._read_at), num_rows=len(pending.rows), num_prefilled=num_prefilled)
        self._read_at = now

    def _drop(self, sequence: Sequence) -> None:
        sequence.finished = True
        self._recent.note(sequence.spec.tenant, sequence.tokens)
        self._fetching.pop(sequence, None)
        self._scheduler.remove(sequence)
        self._runner.forget(sequence)
        self._streams.pop(sequence, None)

    def _drop_stream(self, stream: TokenStream) -> None:
        for sequence in [s for s, of in self._streams.items() if of is stream]:
            self._drop(sequence)

    def _fail_all(self, fault: EngineFault) -> list[Delivery]:
        streams = dict.fromkeys(self._streams.values())
        for sequence in list(self._streams):
            self._drop(sequence)
        self._pending = None
        self._runner.clear()
        return [(stream, fault) for stream in streams]

    # ---- the disk

    def _forget_block(self, block: int, content: Content) -> None:
        self._spill(block, content)
        self._runner.drop(block)

    def _spill(self, block: int, content: Content) -> None:
        if self._disk is not None and content.digest not in self._disk and (arrays := self._runner.export(block)) is not None:
            self._disk.put(content.digest, StoredBlock(content.tokens, content.parent, arrays))

    def _on_disk(self, sequence: Sequence, start: int) -> list[Digest]:
        """The blocks that follow the first `start` and lie on the disk without a gap."""
        digests: list[Digest] = []
        if self._disk is not None:
            for digest in sequence.digests[start : (len(sequence.tokens) - 1) // BLOCK_TOKENS]:
                if digest not in self._disk:
                    break
                digests.append(digest)
        return digests

    def _fetch(self, sequence: Sequence) -> bool:
        """Asks for the blocks of a newcomer that lie on the disk, if reading them takes less time than computing them. It waits
        outside of the scheduler until all have come."""
        if self._disk is None:
            return False
        start = self._scheduler.look_up(sequence)[0] // BLOCK_TOKENS
        digests = self._on_disk(sequence, start)
        read_s, compute_s = self._runner.block_bytes / _DISK_BYTES_PER_S, BLOCK_TOKENS * (self._pace.prefill_s or 1.0)
        if not digests or read_s > compute_s:
            return False
        fetched = self._fetching[sequence] = [Fetched(start + i, digest) for i, digest in enumerate(digests)]
        # The end first: of a prefix, its beginning is to be the most recently used.
        for item in reversed(fetched):

            def arrived(block: StoredBlock | None, item: Fetched = item) -> None:
                self._device.post(lambda: self._arrive(sequence, item, block))

            self._disk.fetch(item.digest, arrived)
        return True

    def _arrive(self, sequence: Sequence, item: "Fetched", block: StoredBlock | None) -> None:
        fetched = self._fetching.get(sequence)
        if fetched is None:
            return  # cancelled
        item.block, item.has_come = block, True
        if all(f.has_come for f in fetched):
            del self._fetching[sequence]
            self._put_back(sequence, fetched)
            self._scheduler.add(sequence)

    def _put_back(self, sequence: Sequence, fetched: list["Fetched"]) -> None:
        pool = self._scheduler.pool
        for item in fetched:
            if item.block is None or item.block.tokens != block_tokens(sequence.tokens, item.index):
                return  # what follows is of no use without it
            block = pool.allocate()
            if block is None:
                return
            try:
                resumable = self._runner.load(block, item.block.arrays)
            except (KeyError, ValueError):  # a file of other shapes than its fingerprint says
                pool.release(block)
                return
            if not pool.publish(block, Content(item.digest, item.block.parent, item.block.tokens, resumable)):
                self._runner.drop(block)
            pool.release(block)
            self.counters.fetched_blocks += 1

    def _hand_over(self, deliveries: list[Delivery]) -> None:
        """All of a step's items cross to their event loop together. Work for a loop that is gone is dropped."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
        for delivery in deliveries:
            by_loop.setdefault(delivery[0].loop, []).append(delivery)
        for loop, batch in by_loop.items():
            mailbox = self._mailboxes.get(loop)
            if mailbox is None:
                mailbox = self._mailboxes[loop] = Mailbox(loop)
            try:
                mailbox.put(batch)
            except RuntimeError:  # the loop is closed; asking first would leave a moment in which it closes
                del self._mailboxes[loop]
                for sequence in [s for s, stream in self._streams.items() if stream.loop is loop]:
                    self._drop(sequence)
