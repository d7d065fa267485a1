import asyncio
import contextvars
import http.client
import logging
import random
import time
from collections.abc import AsyncGenerator, Iterator

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_manager.api.middleware import BodyLimit, RequestId
from mlx_manager.api.server_protocol import ReceiptDeadlines, ReceiptLimits, receipt_deadlines
from mlx_manager.api.sse import ClientGone, EventStream, data, event, until_disconnect
from tests.api.served import Served, cut, is_closed, read_reply, request, serve, wait_until

DONE = data(b"[DONE]")

POST = request("POST", "/v1/chat/completions", body=b'{"a": 1}')


class Feed:
    """A generator of events that remembers what became of it, by the number in the request's query."""

    def __init__(self, *, every_s: float = 0.002, size: int = 20, num_events: int = 10**9) -> None:
        self.every_s = every_s
        self.size = size
        self.num_events = num_events
        self.started: set[str] = set()
        self.ended: dict[str, float] = {}

    async def events(self, name: str) -> AsyncGenerator[bytes]:
        self.started.add(name)
        try:
            for _ in range(self.num_events):
                if self.every_s:
                    await asyncio.sleep(self.every_s)
                yield data(b'"' + b"a" * self.size + b'"')
            yield DONE
        finally:
            await asyncio.sleep(0)  # closing may await
            self.ended[name] = time.monotonic()


def streaming(feed: Feed, *, keep_alive_s: float = 10, send_timeout_s: float = 30) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive).body()
        events = feed.events(scope["query_string"].decode())
        stream = EventStream(events, keep_alive_s=keep_alive_s, send_timeout_s=send_timeout_s)
        await stream(scope, receive, send)

    return RequestId(BodyLimit(app))


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing of this is an error to the server, unless a test takes the records away first."""
    yield
    assert [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR] == []


def numbered(number: int) -> bytes:
    return POST.replace(b"completions ", b"completions?%d " % number)


def test_framing() -> None:
    assert data(b"{}") == b"data: {}\n\n"
    assert event("ping", b"{}") == b"event: ping\ndata: {}\n\n"


def test_a_stream_arrives_whole_and_the_connection_is_used_again(loop: str) -> None:
    feed = Feed(every_s=0, num_events=1000)
    with serve(streaming(feed), loop=loop) as served, served.connect() as client:
        for number in range(3):
            client.sendall(numbered(number))
            reply = read_reply(client, "POST")
            assert reply.body == data(b'"' + b"a" * 20 + b'"') * 1000 + DONE
            assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert reply.headers["cache-control"] == "no-cache"
            assert reply.headers["x-accel-buffering"] == "no"
            assert "content-length" not in reply.headers
        wait_until(lambda: len(feed.ended) == 3, within_s=1)


def test_pipelined_requests_are_streamed_one_after_the_other(loop: str) -> None:
    feed = Feed(num_events=20)
    with serve(streaming(feed), loop=loop) as served, served.connect() as client:
        client.sendall(numbered(1) + numbered(2) + numbered(3))
        received = b""
        while received.count(DONE) < 3:
            received += client.recv(65536)
        assert received.count(b"HTTP/1.1 200 OK") == 3
        wait_until(lambda: len(feed.ended) == 3, within_s=1)


@pytest.mark.parametrize("every_s", [0.002, 3600.0])
def test_a_cut_connection_ends_its_generator_within_half_a_second(loop: str, every_s: float) -> None:
    feed = Feed(every_s=every_s)
    chance = random.Random(7)
    with serve(streaming(feed), loop=loop) as served:
        num_tasks = served.num_tasks()
        clients = [served.connect() for _ in range(50)]
        cut_at: dict[str, float] = {}
        for number, client in enumerate(clients):
            client.sendall(numbered(number))
        wait_until(lambda: len(feed.started) == 50, within_s=5)
        for number, client in sorted(enumerate(clients), key=lambda _: chance.random()):
            time.sleep(chance.random() * 0.01)
            cut_at[str(number)] = time.monotonic()
            cut(client)
        wait_until(lambda: len(feed.ended) == 50, within_s=2)
        assert max(feed.ended[name] - cut_at[name] for name in cut_at) < 0.5
        wait_until(lambda: served.num_tasks() == num_tasks, within_s=1)
        assert served.num_connections() == 0


def test_cuts_while_the_request_is_barely_here_leave_nothing_behind(loop: str) -> None:
    feed = Feed()
    chance = random.Random(11)
    with serve(streaming(feed), loop=loop) as served:
        num_tasks = served.num_tasks()
        for number in range(100):
            client = served.connect()
            client.sendall(numbered(number)[: chance.randrange(1, len(POST) * 2)])
            time.sleep(chance.random() * 0.003)
            cut(client)
        wait_until(lambda: served.num_connections() == 0 and served.num_tasks() == num_tasks, within_s=2)
        assert set(feed.ended) == feed.started


def test_a_cut_is_noticed_behind_a_pipelined_request(loop: str) -> None:
    feed = Feed(every_s=3600)
    with serve(streaming(feed), loop=loop) as served:
        client = served.connect()
        client.sendall(numbered(1))
        wait_until(lambda: len(feed.started) == 1, within_s=2)
        client.sendall(numbered(2))
        time.sleep(0.05)
        cut(client)
        assert wait_until(lambda: len(feed.ended) == 1, within_s=2) < 0.5
        assert feed.started == {"1"}


def test_silence_is_filled_with_keep_alive_lines(loop: str) -> None:
    feed = Feed(every_s=0.28, num_events=2)
    with serve(streaming(feed, keep_alive_s=0.05), loop=loop) as served, served.connect() as client:
        client.sendall(POST)
        parts = read_reply(client, "POST").body.split(data(b'"' + b"a" * 20 + b'"'))
        assert parts[2] == DONE
        for silence in parts[:2]:
            assert silence.replace(b": keep-alive\n\n", b"") == b""
            assert 3 <= silence.count(b": keep-alive") <= 5


def test_a_busy_stream_has_no_keep_alive_lines(loop: str) -> None:
    feed = Feed(every_s=0.01, num_events=40)
    with serve(streaming(feed, keep_alive_s=0.1), loop=loop) as served, served.connect() as client:
        client.sendall(POST)
        assert b"keep-alive" not in read_reply(client, "POST").body


@pytest.mark.parametrize("every_s", [0, 0.01])
def test_a_client_that_never_reads_is_dropped(loop: str, every_s: float) -> None:
    feed = Feed(every_s=every_s, size=100_000)
    with serve(streaming(feed, send_timeout_s=0.3), loop=loop) as served:
        num_tasks = served.num_tasks()
        with served.connect(receive_buffer=4096) as deaf:
            deaf.sendall(POST)
            wait_until(lambda: len(feed.ended) == 1, within_s=4)
            wait_until(lambda: served.num_connections() == 0, within_s=1)
            assert is_closed(deaf)
        wait_until(lambda: served.num_tasks() == num_tasks, within_s=1)


def test_a_client_that_never_reads_is_dropped_by_the_server_alone(loop: str) -> None:
    feed = Feed(every_s=0, size=100_000)
    impatient = receipt_deadlines(ReceiptLimits(stall_s=0.3))
    with serve(streaming(feed), http=impatient, loop=loop) as served, served.connect(receive_buffer=4096) as deaf:
        deaf.sendall(POST)
        wait_until(lambda: len(feed.ended) == 1, within_s=4)
        wait_until(lambda: served.num_connections() == 0, within_s=1)


def test_a_slow_reader_is_waited_for(loop: str) -> None:
    feed = Feed(every_s=0, size=10_000, num_events=400)
    limits = receipt_deadlines(ReceiptLimits(stall_s=0.5))
    with serve(streaming(feed, send_timeout_s=0.5), http=limits, loop=loop) as served, served.connect(receive_buffer=65536) as slow:
        slow.sendall(POST)
        received = b""
        while DONE not in received[-100:]:
            received += slow.recv(100_000)
            time.sleep(0.01)
        assert received.count(b"data: ") == 401


def test_a_stopping_server_closes_generators(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    feed = Feed(every_s=3600)
    with serve(streaming(feed), loop=loop) as served:
        client = served.connect()
        client.sendall(POST)
        wait_until(lambda: len(feed.started) == 1, within_s=2)
    client.close()
    assert len(feed.ended) == 1
    caplog.clear()  # uvicorn says that it cancelled


def test_what_escapes_the_generator_is_logged_and_is_no_clean_end(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> AsyncGenerator[bytes]:
        yield data(b"1")
        raise RuntimeError("escaped")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await EventStream(broken())(scope, receive, send)

    with serve(app, loop=loop) as served, served.connect() as client:
        client.sendall(request())
        with pytest.raises(http.client.IncompleteRead) as cut_short:
            read_reply(client)
        assert cut_short.value.partial == data(b"1")
        errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert [str(record.exc_info[1]) for record in errors if record.exc_info] == ["escaped"]
        caplog.clear()


def test_what_escapes_while_a_generator_is_closed_is_logged(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    began: list[int] = []

    async def broken() -> AsyncGenerator[bytes]:
        try:
            began.append(1)
            await asyncio.sleep(3600)
            yield b""
        finally:
            raise RuntimeError("escaped")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await EventStream(broken())(scope, receive, send)

    with serve(app, loop=loop) as served:
        client = served.connect()
        client.sendall(request())
        wait_until(lambda: bool(began), within_s=2)
        cut(client)
        wait_until(lambda: "escaped" in caplog.text, within_s=2)
        caplog.clear()


def test_the_generator_runs_in_one_context() -> None:
    place = contextvars.ContextVar[str]("place", default="")

    async def spanning() -> AsyncGenerator[bytes]:
        token = place.set("inside")
        try:
            for _ in range(3):
                await asyncio.sleep(0.02)
                yield data(place.get().encode())
        finally:
            place.reset(token)  # an error in any other context

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await EventStream(spanning(), keep_alive_s=0.005)(scope, receive, send)

    with serve(app) as served, served.connect() as client:
        client.sendall(request())
        assert read_reply(client).body.count(data(b"inside")) == 3


async def test_a_send_that_fails_ends_the_generator_without_a_fault() -> None:
    feed = Feed(every_s=0)

    async def receive() -> Message:
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            raise BrokenPipeError

    await EventStream(feed.events("x"))({"type": "http"}, receive, send)
    assert set(feed.ended) == {"x"}


# Whole replies


class Work:
    def __init__(self, duration_s: float) -> None:
        self.duration_s = duration_s
        self.num_started = 0
        self.num_cancelled = 0
        self.num_gone = 0

    async def reply(self) -> Response:
        self.num_started += 1
        try:
            await asyncio.sleep(self.duration_s)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return Response(b"done")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive).body()
        try:
            response = await until_disconnect(receive, self.reply())
        except ClientGone:
            self.num_gone += 1
            return
        await response(scope, receive, send)


def asked(served: Served, num_bytes: int | None = None) -> bytes:
    with served.connect() as client:
        client.sendall(POST[:num_bytes])
        return read_reply(client, "POST").body


def test_a_whole_reply_is_given_and_work_that_nobody_waits_for_is_cancelled(loop: str) -> None:
    work = Work(0.1)
    with serve(BodyLimit(work), loop=loop) as served:
        num_tasks = served.num_tasks()
        assert asked(served) == b"done"
        work.duration_s = 3600
        clients = [served.connect() for _ in range(20)]
        for client in clients:
            client.sendall(POST)
        wait_until(lambda: work.num_started == 21, within_s=2)
        for client in clients:
            cut(client)
        assert wait_until(lambda: work.num_gone == work.num_cancelled == 20, within_s=2) < 0.5
        wait_until(lambda: served.num_tasks() == num_tasks, within_s=1)


def test_pipelined_whole_replies_are_not_taken_for_departures(loop: str) -> None:
    work = Work(0.05)
    with serve(work, loop=loop) as served, served.connect() as client:
        client.sendall(POST * 12)
        received = b""
        while received.count(b"done") < 12:
            received += client.recv(65536)
        assert work.num_cancelled == 0


async def test_a_failure_of_the_work_is_the_callers() -> None:
    async def receive() -> Message:
        await asyncio.sleep(3600)
        raise AssertionError

    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await until_disconnect(receive, fail())
    assert len(asyncio.all_tasks()) == 1


async def test_cancelling_the_caller_cancels_the_work() -> None:
    async def receive() -> Message:
        await asyncio.sleep(3600)
        raise AssertionError

    work = Work(3600)
    calling = asyncio.create_task(until_disconnect(receive, work.reply()))
    await asyncio.sleep(0.01)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert work.num_cancelled == 1
    assert len(asyncio.all_tasks()) == 1


def test_the_default_protocol_is_the_strict_one() -> None:
    assert ReceiptDeadlines.limits == ReceiptLimits()
