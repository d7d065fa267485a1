"""One server as its client sees it: a request goes out, and what comes back is written down with its time.

All failures are observations, of the server or of the way to it; nothing that a server does is raised here. Nothing outlives its
time limit.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from time import perf_counter
from typing import Self, cast

import httpx2

from mlx_manager.bench.results import Endpoint, Target
from mlx_manager.bench.samples import Sample, Usage
from mlx_manager.bench.sse import ServerEvent, SseParser

DRAIN_S = 1.0
"""How long to wait for the end of a body after `[DONE]`: leaving earlier looks like a client that hung up."""

CONTENT_FIELDS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")
"""What, if not empty in a delta, makes its event a content event. An opening event with only a role is none."""


@dataclass(frozen=True, slots=True)
class Limits:
    request_s: float = 120.0
    total_s: float = 1800.0
    """Of a whole comparison. Requests in flight at that moment fail, those not yet sent are never sent."""


@dataclass(frozen=True, slots=True)
class Extra:
    """What a request carries beside the question, and where it goes."""

    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    fields: Mapping[str, object] = field(default_factory=dict[str, object])
    """Of the body."""
    endpoint: Endpoint = "chat/completions"


@dataclass(frozen=True, slots=True)
class Ask:
    text: str
    max_tokens: int
    temperature: float = 0.0
    extra: Extra = Extra()


class BadReply(Exception):
    """The server answered, but not with a stream of a completion that ends as it must. Its text goes into the sample."""


class Client:
    """The connections to one target and the clock of its cell: samples count from `began`. Used as an async context manager.

    Bounded by its callers, not by a pool: a request that waits here for a connection would be measured as a slow server.
    """

    def __init__(self, target: Target, limits: Limits, deadline: float) -> None:
        self.target = target
        self.limits = limits
        self.deadline = deadline
        self.began = perf_counter()
        self._http = httpx2.AsyncClient(
            timeout=None,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=not _is_loopback(httpx2.URL(target.url).host),  # a proxy from the environment has no business on the way to ourselves
        )

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    @property
    def is_out_of_time(self) -> bool:
        return perf_counter() >= self.deadline

    def start_clock(self) -> None:
        self.began = perf_counter()

    async def ask(self, ask: Ask, on_content: Callable[[], None] | None = None) -> Sample:
        """`on_content` is called with the first content event, while the rest is still to come."""
        start = perf_counter()
        allowed_s = min(self.limits.request_s, self.deadline - start)
        reply = Reply(on_content)
        error = None
        try:
            async with asyncio.timeout(allowed_s):
                await self._stream(ask, reply)
        except TimeoutError:
            error = "time limit of the request" if allowed_s == self.limits.request_s else "time limit of the run"
        except (httpx2.HTTPError, httpx2.InvalidURL) as problem:
            error = f"{type(problem).__name__}: {problem}"
        except BadReply as problem:
            error = str(problem)
        end = perf_counter() if reply.done_at is None else reply.done_at
        return Sample(
            start_s=round(start - self.began, 6),
            events_s=tuple(round(at - start, 6) for at in reply.events_at),
            end_s=round(end - start, 6),
            usage=reply.usage,
            finish_reason=reply.finish_reason,
            error=None if error is None else error[:300],
        )

    async def _stream(self, ask: Ask, reply: "Reply") -> None:
        is_chat = ask.extra.endpoint == "chat/completions"
        question = {"messages": [{"role": "user", "content": ask.text}]} if is_chat else {"prompt": ask.text}
        body = {
            "model": self.target.model,
            **question,
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **ask.extra.fields,
        }
        headers = {"accept": "text/event-stream", "accept-encoding": "identity", **ask.extra.headers}
        if self.target.api_key is not None:
            headers["authorization"] = f"Bearer {self.target.api_key}"
        async with self._http.stream("POST", self.target.url_of(ask.extra.endpoint), json=body, headers=headers) as response:
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


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(slots=True)
class Reply:
    """What has come of one stream so far. Owned by the request that reads it."""

    on_content: Callable[[], None] | None = None
    events_at: list[float] = field(default_factory=list[float])
    usage: Usage | None = None
    finish_reason: str | None = None
    done_at: float | None = None

    def take(self, event: ServerEvent, now: float) -> None:
        """Raises BadReply for an error event and for what is no chunk of a completion."""
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
            has_content = has_content or bool(choice.get("text")) or any(delta.get(name) for name in CONTENT_FIELDS)
            if isinstance(reason := choice.get("finish_reason"), str):
                self.finish_reason = reason
        if has_content:
            self.events_at.append(now)
            if len(self.events_at) == 1 and self.on_content is not None:
                self.on_content()


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
