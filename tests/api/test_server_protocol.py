import asyncio
import json
import socket
import time
from collections.abc import Iterator

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from mlx_manager.api.server_protocol import ReceiptLimits, is_loopback, receipt_deadlines
from tests.api.served import Served, ask, cut, is_closed, read_reply, request, serve, wait_until

POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await PlainTextResponse(body)(scope, receive, send)


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    limits = ReceiptLimits(headers_s=0.4, body_s=0.6)
    with serve(echo, http=receipt_deadlines(limits), loop=request.param) as served:
        yield served


def trickle(client: socket.socket, rest: bytes, *, every_s: float) -> None:
    """Send a byte at a time until the server has had enough."""
    client.settimeout(every_s)
    for byte in rest:
        try:
            client.send(bytes([byte]))
            client.recv(1, socket.MSG_PEEK)
            break
        except TimeoutError:
            continue
    client.settimeout(5)


def test_trickled_headers_are_answered_408_and_closed_while_others_are_served(served: Served) -> None:
    with served.connect() as slow:
        began = time.monotonic()
        slow.sendall(b"GET / HTTP/1.1\r\n")
        assert ask(served, request("POST", body=b"hello")).body == b"hello"
        assert time.monotonic() - began < 0.3
        trickle(slow, b"X-Slow: " + b"a" * 100, every_s=0.05)
        reply = read_reply(slow)
        assert 0.35 < time.monotonic() - began < 1
        assert reply.status == 408
        assert json.loads(reply.body)["error"]["code"] == "request_timeout"
        assert reply.headers["connection"] == "close"
        assert reply.headers["x-request-id"] == reply.headers["request-id"]
        assert is_closed(slow)


@pytest.mark.parametrize("framing", [b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n"])
def test_a_trickled_body_is_answered_408_and_closed_while_others_are_served(served: Served, framing: bytes) -> None:
    with served.connect() as slow:
        began = time.monotonic()
        slow.sendall(POST + framing)
        assert ask(served, request("POST", body=b"hello")).body == b"hello"
        trickle(slow, b"a" * 100, every_s=0.05)
        reply = read_reply(slow)
        assert 0.55 < time.monotonic() - began < 1.2
        assert reply.status == 408
        assert json.loads(reply.body)["error"]["type"] == "invalid_request_error"
        assert is_closed(slow)


def test_two_hundred_trickling_connections_do_not_delay_others(served: Served) -> None:
    slow = [served.connect() for _ in range(200)]
    try:
        for client in slow:
            client.sendall(b"GET / HTTP/1.1\r\nX: ")
        began = time.monotonic()
        for _ in range(20):
            assert ask(served, request()).status == 200
        assert time.monotonic() - began < 1
        wait_until(lambda: served.num_connections() == 0, within_s=3)
    finally:
        for client in slow:
            client.close()


def test_each_request_of_a_connection_has_its_own_deadline(served: Served) -> None:
    with served.connect() as client:
        for _ in range(4):
            client.sendall(request("POST", body=b"hello"))
            assert read_reply(client, "POST").body == b"hello"
            time.sleep(0.2)  # idle, together longer than any deadline
        client.sendall(b"GET / HT")
        assert read_reply(client).status == 408


def test_line_ends_alone_are_closed_without_an_answer(served: Served) -> None:
    with served.connect() as client:
        client.sendall(b"\r\n\r\n")
        assert client.recv(1000) == b""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_connection_without_a_first_byte_ends_as_an_idle_one(loop: str) -> None:
    with serve(echo, loop=loop) as served:
        served.server.config.timeout_keep_alive = 0.2  # type: ignore[assignment]
        with served.connect() as client:
            assert client.recv(1000) == b""


def test_an_answer_under_way_is_not_cut_by_the_deadline_of_the_next_request() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive).body()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        for _ in range(4):
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            await asyncio.sleep(0.15)
        await send({"type": "http.response.body"})

    with serve(slow, http=receipt_deadlines(ReceiptLimits(headers_s=0.2, body_s=0.2))) as served, served.connect() as client:
        client.sendall(request() + request("POST", body=b"abcd")[:-2])
        reply = read_reply(client)
        assert (reply.status, reply.body) == (200, b"aaaa")


@pytest.mark.parametrize(
    "head",
    [
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Host: localhost\r\n\r\n",
        POST + b"hOST: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: y\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://localhost@evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        POST + b"Connection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc",
        POST + b"X: a\r\n folded\r\n\r\n",
        *(POST + b"X: a" + bytes([control]) + b"b\r\n\r\n" for control in (0, 1, 8, 10, 11, 13, 27, 31, 127)),
    ],
)
def test_ambiguous_messages_are_answered_400_and_closed(served: Served, head: bytes) -> None:
    with served.connect() as client:
        client.sendall(head)
        reply = read_reply(client)
        assert reply.status == 400
        assert json.loads(reply.body)["error"]["code"] == "invalid_http_request"
        assert is_closed(client)


@pytest.mark.parametrize(
    "head",
    [
        b"GET http://LOCALHOST:80/a HTTP/1.1\r\nHost: localhost:80\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        POST + b"X: a\tb \x80\xff\r\nContent-Length: 0\r\n\r\n",
        POST + b"Connection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_unusual_but_clear_messages_are_served(served: Served, head: bytes) -> None:
    assert ask(served, head).status == 200


def test_endless_headers_are_answered_431(served: Served) -> None:
    with served.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        for _ in range(40):
            client.sendall(b"X: " + b"a" * 4000 + b"\r\n")
            time.sleep(0.001)
            if served.num_connections() == 0:
                break
        assert read_reply(client).status == 431
    assert ask(served, request(x_big="a" * 70_000)).status == 431
    assert ask(served, request(x_big="a" * 50_000)).status == 200


def test_trailers_do_not_become_headers() -> None:
    async def names(scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive).body()
        await Response(b",".join(name for name, _ in scope["headers"]))(scope, receive, send)

    with serve(names) as served:
        reply = ask(served, POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Api-Key: z\r\n\r\n")
        assert reply.body == b"host,transfer-encoding"


def test_an_answer_before_the_body_leaves_the_connection_usable_and_still_idle_limited() -> None:
    async def early(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("no", 401)(scope, receive, send)

    with serve(early, http=receipt_deadlines(ReceiptLimits(body_s=0.5))) as served:
        served.server.config.timeout_keep_alive = 0.3  # type: ignore[assignment]
        with served.connect() as client:
            for _ in range(2):
                client.sendall(POST + b"Content-Length: 4\r\n\r\n")
                assert read_reply(client).status == 401
                client.sendall(b"late")
            began = time.monotonic()
            assert client.recv(1000) == b""
            assert time.monotonic() - began < 1
        with served.connect() as client:
            client.sendall(POST + b"Content-Length: 400\r\n\r\n")
            assert read_reply(client).status == 401
            trickle(client, b"a" * 100, every_s=0.05)
            assert is_closed(client)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("num_bytes", [20_000_000, 3_000_000])
def test_a_reply_that_nobody_takes_is_thrown_away_with_its_connection(loop: str, num_bytes: int) -> None:
    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(b"a" * num_bytes, headers={"connection": "close"})(scope, receive, send)

    with serve(large, http=receipt_deadlines(ReceiptLimits(stall_s=0.3)), loop=loop) as served:
        with served.connect(receive_buffer=4096) as deaf:
            deaf.sendall(request())
            wait_until(lambda: served.num_connections() == 1, within_s=1)
            wait_until(lambda: served.num_connections() == 0, within_s=2)
        assert len(ask(served, request()).body) == num_bytes


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_reply_that_is_taken_slowly_arrives_whole(loop: str) -> None:
    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(b"a" * 20_000_000)(scope, receive, send)

    patient = receipt_deadlines(ReceiptLimits(stall_s=0.2))
    with serve(large, http=patient, loop=loop) as served, served.connect(receive_buffer=65536) as slow:
        slow.sendall(request())
        num_bytes = 0
        while num_bytes < 20_000_000 and (taken := slow.recv(400_000)):
            num_bytes += len(taken)
            time.sleep(0.002)
        assert num_bytes > 20_000_000


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_hardly_anything_waits_in_our_memory_for_a_client_that_does_not_read(loop: str) -> None:
    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"a" * 1000, "more_body": True})
            await asyncio.sleep(0)

    protocol = receipt_deadlines(ReceiptLimits(stall_s=0.5))
    with serve(endless, http=protocol, loop=loop) as served, served.connect(receive_buffer=4096) as deaf:
        deaf.sendall(request())
        wait_until(lambda: served.num_connections() == 1, within_s=1)
        (connection,) = served.server.server_state.connections
        wait_until(lambda: connection.transport.get_write_buffer_size() > 0, within_s=2)  # type: ignore[union-attr]
        time.sleep(0.2)
        assert 0 < connection.transport.get_write_buffer_size() < 10_000  # type: ignore[union-attr]
        served.run(_cancel(served))


async def _cancel(served: Served) -> None:
    for task in served.server.server_state.tasks:
        task.cancel()


def test_one_peer_holds_no_more_than_its_share() -> None:
    limits = ReceiptLimits(max_connections_per_peer=3, may_exceed_connections=lambda address: False)
    with serve(echo, http=receipt_deadlines(limits)) as served:
        held = [served.connect() for _ in range(3)]
        try:
            wait_until(lambda: served.num_connections() == 3, within_s=1)
            with served.connect() as refused:
                assert is_closed(refused)
            cut(held.pop())
            wait_until(lambda: served.num_connections() == 2, within_s=1)
            assert ask(served, request()).status == 200
        finally:
            for client in held:
                client.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_loopback_in_all_its_spellings(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize("address", ["10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "localhost", ""])
def test_what_is_not_loopback(address: str) -> None:
    assert not is_loopback(address)
