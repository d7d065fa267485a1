"""Sends workloads to targets and writes down what comes back, when.

A closed loop: each of `concurrency` workers sends its next request when its last has ended. All failures are observations, of
the server or of the way to it; nothing that a server does ends a run. Nothing outlives its time limit.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from ipaddress import ip_address
from time import perf_counter
from typing import cast

import httpx2

from mlx_manager.bench.machine import Machine, this_machine
from mlx_manager.bench.prompts import WordScale, texts
from mlx_manager.bench.results import Cell, Results, Sample, Target, Usage, Workload
from mlx_manager.bench.sse import ServerEvent, SseParser

DRAIN_S = 1.0
"""How long to wait for the end of a body after `[DONE]`: leaving earlier looks like a client that hung up."""

PROBE_WORDS = (16, 128)
CONTENT_FIELDS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")
"""What, if not empty in a delta, makes its event a content event. An opening event with only a role is none."""


@dataclass(frozen=True, slots=True)
class Limits:
    request_s: float = 120.0
    total_s: float = 1800.0
    """Of a whole comparison. Requests in flight at that moment fail, those not yet sent are never sent."""


class BadReply(Exception):
    """The server answered, but not with a chat completion stream that ends as it must. Its text goes into the sample."""


async def compare(
    targets: Sequence[Target],
    workloads: Sequence[Workload],
    repeats: int = 3,
    *,
    seed: int = 0,
    limits: Limits | None = None,
    machine: Machine | None = None,
    on_cell: Callable[[Cell], None] | None = None,
) -> Results:
    """Every workload on every target, `repeats` times, targets in turn: A B, B A, A B …, so that what the machine does
    meanwhile hits all of them. All targets get the same prompts in a repeat, and new ones in the next.

    Before each workload every target gets a short unmeasured warm-up. The same seed gives the same prompts: against a server
    that kept its prefix cache since the last run take another one. Raises ValueError for names or workloads given twice.
    """
    if len({target.name for target in targets}) < len(targets) or len(set(workloads)) < len(workloads):
        raise ValueError("targets need different names, and workloads must differ")
    if not targets or not workloads or repeats < 1:
        raise ValueError("a comparison needs a target, a workload and a repeat")
    limits = limits or Limits()
    deadline = perf_counter() + limits.total_s
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    machine = machine or await asyncio.to_thread(this_machine)
    scale = WordScale()
    if any(not workload.prompts for workload in workloads):
        scale = await _word_scale(targets, seed, limits, deadline)
    cells: list[Cell] = []
    stopped = None
    for position, repeat, order in _schedule(len(workloads), repeats, targets):
        workload = workloads[position]
        if repeat == 0:
            warm_up = replace(workload, requests=min(workload.requests, workload.concurrency), max_tokens=min(workload.max_tokens, 16))
            for target in order:
                await measure(target, warm_up, _prompts(warm_up, scale, f"{seed}/{position}/warm-up"), limits=limits, deadline=deadline)
        prompts = _prompts(workload, scale, f"{seed}/{position}/{repeat}")
        for target in order:
            if perf_counter() >= deadline:
                stopped = f"the time limit of {limits.total_s:.0f} s was reached"
                break
            cell = await measure(target, workload, prompts, repeat=repeat, limits=limits, deadline=deadline)
            cells.append(cell)
            if on_cell is not None:
                on_cell(cell)
    return Results(tuple(targets), tuple(workloads), repeats, seed, tuple(cells), machine, started_at, stopped)


async def measure(
    target: Target,
    workload: Workload,
    prompts: Sequence[str],
    *,
    repeat: int = 0,
    limits: Limits | None = None,
    deadline: float | None = None,
) -> Cell:
    """One cell. Of `prompts` the first primes, if the workload says so, the others are sent in turn. `deadline` is a
    `perf_counter` time; by default the limits' total from now."""
    limits = limits or Limits()
    deadline = perf_counter() + limits.total_s if deadline is None else deadline
    primer, *measured = prompts
    async with _client(target) as client:
        if workload.primed:
            await _ask(client, target, replace(workload, max_tokens=1), primer, perf_counter(), limits, deadline)
        began = perf_counter()
        numbers = iter(range(workload.requests))
        samples: list[Sample] = []

        async def worker() -> None:
            for number in numbers:
                if perf_counter() >= deadline:
                    return
                samples.append(await _ask(client, target, workload, measured[number % len(measured)], began, limits, deadline))

        async with asyncio.TaskGroup() as workers:
            for _ in range(min(workload.concurrency, workload.requests)):
                workers.create_task(worker())
    wall_s = max((sample.start_s + sample.end_s for sample in samples), default=0.0)
    return Cell(target.name, workload, repeat, wall_s, tuple(sorted(samples, key=lambda sample: sample.start_s)))


def _schedule(num_workloads: int, repeats: int, targets: Sequence[Target]) -> Iterator[tuple[int, int, Sequence[Target]]]:
    """(position of the workload, repeat, targets in the order of their turn). Every other repeat runs backwards, so that no
    target always comes first, on the machine as the last cell left it."""
    for position in range(num_workloads):
        for repeat in range(repeats):
            yield position, repeat, targets if repeat % 2 == 0 else targets[::-1]


def _prompts(workload: Workload, scale: WordScale, salt: str) -> list[str]:
    """One more than the requests: the first is for priming, and like the others in all but its own words."""
    if workload.prompts:
        return [workload.prompts[0], *workload.prompts]
    return texts(workload.prefix, scale.num_words(workload.prompt_tokens), workload.requests + 1, salt)


async def _word_scale(targets: Sequence[Target], seed: int, limits: Limits, deadline: float) -> WordScale:
    """From the first target that answers two probes with a usage; a token a word if none does."""
    for target in targets:
        seen: list[tuple[int, int]] = []
        for num_words in PROBE_WORDS:
            probe = Workload(prompt_tokens=num_words, max_tokens=1, concurrency=1, requests=1)
            prompts = texts("unique", num_words, 2, f"{seed}/probe/{num_words}")
            cell = await measure(target, probe, prompts, limits=limits, deadline=deadline)
            seen.extend((num_words, sample.usage.prompt_tokens) for sample in cell.completed if sample.usage is not None)
        if len(seen) == 2:
            return WordScale.through(*seen)
    return WordScale()


def _client(target: Target) -> httpx2.AsyncClient:
    """Bounded by the workers, not by a pool: a request that waits here for a connection would be measured as a slow server."""
    return httpx2.AsyncClient(
        timeout=None,
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=not _is_loopback(httpx2.URL(target.url).host),  # a proxy from the environment has no business on the way to ourselves
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _ask(
    client: httpx2.AsyncClient, target: Target, workload: Workload, text: str, began: float, limits: Limits, deadline: float
) -> Sample:
    start = perf_counter()
    allowed_s = min(limits.request_s, deadline - start)
    reply = Reply()
    error = None
    try:
        async with asyncio.timeout(allowed_s):
            await _stream(client, target, workload, text, reply)
    except TimeoutError:
        error = "time limit of the request" if allowed_s == limits.request_s else "time limit of the run"
    except (httpx2.HTTPError, httpx2.InvalidURL) as problem:
        error = f"{type(problem).__name__}: {problem}"
    except BadReply as problem:
        error = str(problem)
    end = perf_counter() if reply.done_at is None else reply.done_at
    return Sample(
        start_s=round(start - began, 6),
        events_s=tuple(round(at - start, 6) for at in reply.events_at),
        end_s=round(end - start, 6),
        usage=reply.usage,
        finish_reason=reply.finish_reason,
        error=None if error is None else error[:300],
    )


async def _stream(client: httpx2.AsyncClient, target: Target, workload: Workload, text: str, reply: "Reply") -> None:
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": workload.max_tokens,
        "temperature": workload.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"accept": "text/event-stream", "accept-encoding": "identity"}
    if target.api_key is not None:
        headers["authorization"] = f"Bearer {target.api_key}"
    async with client.stream("POST", target.chat_url, json=body, headers=headers) as response:
        if not response.is_success:
            raise BadReply(f"HTTP {response.status_code}: {_message(await response.aread())}")
        content_type = response.headers.get("content-type", "")
        if not content_type.startswith("text/event-stream"):
            raise BadReply(f"not an event stream but {content_type or 'a body without content-type'}")
        parser = SseParser()
        chunks = response.aiter_bytes()
        async for chunk in chunks:
            now = perf_counter()
            for event in parser.feed(chunk):
                reply.take(event, now)
            if reply.done_at is not None:
                with suppress(TimeoutError, httpx2.HTTPError):
                    async with asyncio.timeout(DRAIN_S):
                        async for _ in chunks:
                            pass
                break
        for event in parser.finish():
            reply.take(event, perf_counter())
    if reply.done_at is None:
        raise BadReply("cut off: the stream ended before [DONE]")
    if reply.finish_reason is None:
        raise BadReply("[DONE] without a finish_reason")


@dataclass(slots=True)
class Reply:
    """What has come of one stream so far. Owned by the request that reads it."""

    events_at: list[float] = field(default_factory=list[float])
    usage: Usage | None = None
    finish_reason: str | None = None
    done_at: float | None = None

    def take(self, event: ServerEvent, now: float) -> None:
        """Raises BadReply for an error event and for what is no chat completion chunk."""
        if self.done_at is not None:
            return
        if event.data == "[DONE]":
            self.done_at = now
            return
        chunk = _json_object(event.data)
        if chunk is None:
            raise BadReply(f"an event that is no JSON object: {event.data[:80]!r}")
        if event.name == "error" or chunk.get("error") is not None:
            raise BadReply(f"error event: {_message(event.data.encode())}")
        self.usage = _usage(chunk.get("usage")) or self.usage
        has_content = False
        for choice in map(_as_object, _as_list(chunk.get("choices"))):
            delta = _as_object(choice.get("delta"))
            has_content = has_content or any(delta.get(name) for name in CONTENT_FIELDS)
            if isinstance(reason := choice.get("finish_reason"), str):
                self.finish_reason = reason
        if has_content:
            self.events_at.append(now)


def _usage(value: object) -> Usage | None:
    usage = _as_object(value)
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    cached = _as_object(usage.get("prompt_tokens_details")).get("cached_tokens")
    return Usage(prompt, completion, cached if isinstance(cached, int) else None)


def _message(body: bytes) -> str:
    """The human part of an error body, whichever envelope it came in; the body itself if it is in none."""
    text = body.decode("utf-8", errors="replace")
    envelope = _json_object(text)
    if envelope is None:
        return " ".join(text.split())
    error = envelope.get("error", envelope)
    inner = _as_object(error)
    message = next((inner[name] for name in ("message", "detail", "title") if isinstance(inner.get(name), str)), error)
    return message if isinstance(message, str) else json.dumps(message)


def _json_object(text: str) -> dict[str, object] | None:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, object]", value) if isinstance(value, dict) else None


def _as_object(value: object) -> dict[str, object]:
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}


def _as_list(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []
