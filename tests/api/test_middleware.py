import http.client
import json
from collections.abc import Iterator

import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mlx_manager.api.middleware import ApiKey, BodyLimit, RequestId, SecurityHeaders, TrustedOrigin, new_request_id
from tests.api.served import Served, ask, cut, is_closed, read_reply, request, serve, wait_until


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse({"id": scope["state"]["request_id"]})(scope, receive, send)


# Request id


async def test_request_ids_are_random_and_safe_in_urls() -> None:
    ids = {new_request_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(id_) == 28 and id_.startswith("req_") and id_.replace("-", "").replace("_", "").isalnum() for id_ in ids)


def test_every_reply_names_its_request_also_a_fault() -> None:
    async def sometimes(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/":
            raise RuntimeError("/root/secret")
        await hello(scope, receive, send)

    with serve(RequestId(sometimes)) as served:
        reply = ask(served, request(x_request_id="mine"))
        assert reply.headers.get_all("x-request-id") == reply.headers.get_all("request-id") == [json.loads(reply.body)["id"]]
        fault = ask(served, request(target="/v1/messages"))
        assert fault.status == 500
        error = json.loads(fault.body)
        assert error["error"]["type"] == "api_error"
        assert error["request_id"] == fault.headers["x-request-id"] == fault.headers["request-id"]
        assert b"secret" not in fault.body


def test_a_fault_after_the_start_of_a_reply_is_not_answered_twice(caplog: pytest.LogCaptureFixture) -> None:
    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("half way")

    with serve(RequestId(half)) as served, served.connect() as client:
        client.sendall(request())
        with pytest.raises(http.client.IncompleteRead):
            read_reply(client)
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "half way"


# Security headers


def test_every_reply_tells_browsers_what_they_may_do() -> None:
    with serve(RequestId(SecurityHeaders(TrustedOrigin(hello)))) as served:
        for reply in (ask(served, request()), ask(served, request(host="evil.example"))):
            assert "script-src 'self';" in reply.headers["content-security-policy"]
            assert "unsafe" not in reply.headers["content-security-policy"]
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["referrer-policy"] == "no-referrer"
            assert reply.headers["cross-origin-opener-policy"] == "same-origin"
            assert reply.headers["cross-origin-resource-policy"] == "same-origin"


# Host and Origin


@pytest.fixture(scope="module")
def guarded() -> Iterator[Served]:
    guard = TrustedOrigin(
        hello,
        allowed_hosts=["mac.local", "nas:9000"],
        allowed_origins=["https://chat.example", "http://localhost:3000"],
    )
    with serve(RequestId(guard)) as served:
        yield served


@pytest.fixture(scope="module")
def guarded_v6() -> Iterator[Served]:
    with serve(RequestId(TrustedOrigin(hello)), address="::1") as served:
        yield served


def status(served: Served, host: str | None, *, target: str = "/v1/models", **headers: str) -> int:
    host = host and host.replace("PORT", str(served.port))
    headers = {name: value.replace("PORT", str(served.port)) for name, value in headers.items()}
    return ask(served, request(host=host, target=target, **headers)).status


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost",
        "localhost:PORT",
        "127.0.0.1",
        "127.0.0.1:PORT",
        "mac.local",
        "MAC.local:PORT",
        "nas:9000",
        "localhost:3000",
        "127.0.0.1:443",
    ],  # the ports of allowed origins
)
def test_our_own_names_are_served(guarded: Served, host: str) -> None:
    assert status(guarded, host) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:PORT",
        "localhost.",
        "localhost.:PORT",
        "127.0.0.1.",
        "mac.local.",
        "evil.mac.local",
        "a.localhost",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "127.0.0.2",
        "0.0.0.0",
        "0.0.0.0:PORT",
        "10.0.0.1",
        "127.1",
        "2130706433",
        "0x7f.0.0.1",
        "[::1]",
        "[::1]:PORT",
        "::1",
        "[127.0.0.1]",
        "[localhost]",
        "[::ffff:10.0.0.1]",
        "localhost:1",
        "localhost:0",
        "localhost:",
        "localhost:99999",
        "localhost:PORT:PORT",
        "localhost:+PORT",
        "localhost:0PORT",
        "nas",
        "nas:9001",
        "user@localhost",
        "localhost@evil.example",
        "evil.example#localhost",
        "localhost/evil",
        "localhost\\evil",
        "localhost, evil.example",
        "localhost%00",
        "%6cocalhost",
        "löcalhost",
        "",
        "-",
        ".",
    ],
)
@pytest.mark.parametrize("target", ["/v1/models", "/"])
def test_other_names_are_not(guarded: Served, host: str, target: str) -> None:
    assert status(guarded, host, target=target) == 403


def test_the_refusal_speaks_the_language_of_the_path(guarded: Served) -> None:
    reply = ask(guarded, request(host="evil.example", target="/v1/messages"))
    assert json.loads(reply.body)["error"]["type"] == "permission_error"
    assert reply.headers["x-request-id"] == json.loads(reply.body)["request_id"]
    assert reply.headers["x-should-retry"] == "false"


def test_no_host_at_all_is_refused(guarded: Served) -> None:
    assert ask(guarded, b"GET / HTTP/1.0\r\n\r\n").status == 403


@pytest.mark.parametrize(
    ("target", "host", "expected"),
    [
        ("http://localhost:PORT/", "localhost:PORT", 200),
        ("http://evil.example/", "evil.example", 403),
        ("http://evil.example/", "localhost", 400),
        ("http://localhost/", "evil.example", 400),
        ("http://user@localhost/", "user@localhost", 403),
        ("//evil.example/", "localhost", 200),  # a path, whatever it looks like
    ],
)
def test_absolute_targets_pass_under_no_other_name(guarded: Served, target: str, host: str, expected: int) -> None:
    assert status(guarded, host, target=target.replace("PORT", str(guarded.port))) == expected


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("[::1]", 200),
        ("[::1]:PORT", 200),
        ("[0:0:0:0:0:0:0:1]:PORT", 200),
        ("localhost:PORT", 200),
        ("::1", 403),
        ("[::1]:1", 403),
        ("[::2]", 403),
        ("[::1", 403),
        ("[::1%lo]", 403),
        ("127.0.0.1", 403),
        ("[::]", 403),
    ],
)
def test_ipv6_names(guarded_v6: Served, host: str, expected: int) -> None:
    assert status(guarded_v6, host) == expected


def test_a_dual_stack_socket_knows_its_ipv4_address() -> None:
    with serve(RequestId(TrustedOrigin(hello)), address="::") as served:
        served.address = "127.0.0.1"
        assert status(served, "127.0.0.1:PORT") == 200
        assert status(served, "[::ffff:127.0.0.1]:PORT") == 200
        assert status(served, "[::1]:PORT") == 403


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:PORT", "http://localhost:PORT"),
        ("127.0.0.1:PORT", "http://127.0.0.1:PORT"),
        ("mac.local", "http://mac.local"),
        ("mac.local", "http://mac.local:80"),
        ("localhost:PORT", "http://localhost:3000"),
        ("localhost:PORT", "https://chat.example"),
    ],
)
def test_our_own_and_listed_origins_are_served(guarded: Served, host: str, origin: str) -> None:
    assert status(guarded, host, origin=origin) == 200


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "*",
        "https://evil.example",
        "http://evil.example:PORT",
        "http://localhost",
        "https://localhost:PORT",
        "http://localhost:1",
        "http://127.0.0.1:PORT",
        "http://chat.example",
        "https://chat.example:8443",
        "https://a.chat.example",
        "https://chat.example.evil.example",
        "https://chat.example.",
        "https://chat.example/",
        "https://user@chat.example",
        "file://",
        "chrome-extension://abc",
        "localhost:PORT",
        "http://localhost:PORT, http://evil.example",
        "http://localhost:PORT http://evil.example",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_other_origins_are_not_and_learn_nothing(guarded: Served, origin: str, method: str) -> None:
    origin = origin.replace("PORT", str(guarded.port))
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    reply = ask(guarded, request(method, "/v1/models", host=f"localhost:{guarded.port}", **headers))
    assert reply.status == 403
    assert not [name for name in reply.headers if name.lower().startswith("access-control")]


def test_two_origins_are_none(guarded: Served) -> None:
    own = f"http://localhost:{guarded.port}".encode()
    reply = ask(guarded, b"GET / HTTP/1.1\r\nHost: localhost:%d\r\nOrigin: %b\r\nOrigin: %b\r\n\r\n" % (guarded.port, own, own))
    assert reply.status == 403


def test_only_a_listed_origin_is_told_that_it_may_read(guarded: Served) -> None:
    reply = ask(guarded, request(origin="https://chat.example"))
    assert reply.headers["access-control-allow-origin"] == "https://chat.example"
    assert "access-control-allow-credentials" not in reply.headers
    assert "x-request-id" in reply.headers["access-control-expose-headers"]
    assert reply.headers["vary"] == "origin"
    own = ask(guarded, request(origin=f"http://localhost:{guarded.port}", host=f"localhost:{guarded.port}"))
    assert "access-control-allow-origin" not in own.headers


def test_preflight() -> None:
    def preflight(**headers: str) -> bytes:
        asked = {"Access-Control-Request-Method": "POST", "Origin": "https://chat.example", **headers}
        return request("OPTIONS", "/v1/chat/completions", **asked)

    with serve(RequestId(TrustedOrigin(ApiKey(hello, key="k"), allowed_origins=["https://chat.example"]))) as served:
        wanted = "authorization, Content-Type, x-api-key, x-stainless-os, anthropic-version, x-evil, x-stainless-\x80"
        reply = ask(served, preflight(**{"Access-Control-Request-Headers": wanted}))
        assert reply.status == 204
        assert reply.body == b""
        assert reply.headers["access-control-allow-origin"] == "https://chat.example"
        assert reply.headers["access-control-allow-headers"] == "authorization, content-type, x-api-key, x-stainless-os, anthropic-version"
        assert "POST" in reply.headers["access-control-allow-methods"]
        assert ask(served, request("OPTIONS", origin="https://chat.example", target="/v1/models")).status == 401  # not a preflight


@pytest.mark.parametrize("hosts", [["*"], ["http://x"], ["x."], ["x:0"], [""], ["::1"]])
def test_a_host_that_is_none_cannot_be_allowed(hosts: list[str]) -> None:
    with pytest.raises(ValueError, match="not a host or origin"):
        TrustedOrigin(hello, allowed_hosts=hosts)


@pytest.mark.parametrize("origins", [["*"], ["null"], ["x"], ["https://x/"], ["ftp://x"]])
def test_an_origin_that_is_none_cannot_be_allowed(origins: list[str]) -> None:
    with pytest.raises(ValueError, match="not a host or origin"):
        TrustedOrigin(hello, allowed_origins=origins)


# Key


def routed() -> Starlette:
    async def answer(request: Request) -> Response:
        return Response(request.url.path)

    paths = ["/", "/health", "/health/ready", "/static/{name:path}", "/v1/models", "/v1/models/{id:path}", "/metrics"]
    app = Starlette(routes=[Route(path, answer) for path in paths])
    app.router.redirect_slashes = False
    return app


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    with serve(RequestId(ApiKey(routed(), key=SecretStr("sk-right")))) as served:
        yield served


@pytest.mark.parametrize(
    "target", ["/", "/?a=b", "/health", "/health/ready", "/static/app.js", "/static/a/b.c-d_e.css", "/static/..a", "/%68ealth"]
)
def test_the_public_list_needs_no_key(locked: Served, target: str) -> None:
    assert ask(locked, request(target=target)).status == 200


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/nope",
        "/v1%2fmodels",
        "/v1/%6dodels",
        "//v1/models",
        "/v1//models",
        "/V1/MODELS",
        "/v1/models/",
        "/v1/./models",
        "/static/../v1/models",
        "/static/%2e%2e/v1/models",
        "/static/..",
        "/static//v1/models",
        "/static/",
        "/static",
        "/static/.",
        "/static/a/./b",
        "/static/..%2f..%2fv1/models",
        "/static/a%00",
        "/static/a%0a",
        "/static\\..\\v1/models",
        "/health/",
        "/HEALTH",
        "/health/ready/",
        "/health%2fready%2f",
        "/health/../v1/models",
        "/health;/v1/models",
        "/health%0a",
        "//",
        "/.",
        "/%00",
        "/v1/models?x=/health",
        "/v1/models#/health",
        "/STATIC/a",
    ],
)
def test_everything_else_does_however_it_is_spelled(locked: Served, target: str) -> None:
    reply = ask(locked, request(target=target))
    assert reply.status == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Authorization": "Bearer sk-right"}, 200),
        ({"Authorization": "bearer  sk-right"}, 200),
        ({"X-Api-Key": "sk-right"}, 200),
        ({"Authorization": "Bearer sk-right", "X-Api-Key": "wrong"}, 200),
        ({"Authorization": "Bearer wrong", "X-Api-Key": "sk-right"}, 401),
        ({"Authorization": "Basic sk-right", "X-Api-Key": "sk-right"}, 401),
        ({"Authorization": "", "X-Api-Key": "sk-right"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "sk-right"}, 401),
        ({"Authorization": "Bearer sk-righ"}, 401),
        ({"Authorization": "Bearer sk-right2"}, 401),
        ({"Authorization": "Bearer SK-RIGHT"}, 401),
        ({"Authorization": "Bearer \xff' OR 1=1 --"}, 401),
        ({"X-Api-Key": ""}, 401),
        ({"X-Api-Key": "wrong"}, 401),
        ({"Api-Key": "sk-right"}, 401),
        ({}, 401),
    ],
)
def test_either_header_carries_the_key(locked: Served, headers: dict[str, str], expected: int) -> None:
    assert ask(locked, request(target="/v1/models", **headers)).status == expected


@pytest.mark.parametrize("header", [b"Authorization: Bearer sk-right", b"X-Api-Key: sk-right"])
def test_a_credential_given_twice_is_none(locked: Served, header: bytes) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + header + b"\r\n" + header + b"\r\n\r\n"
    assert ask(locked, head).status == 401


@pytest.mark.parametrize(
    ("target", "type_"),
    [("/v1/chat/completions", "invalid_request_error"), ("/v1/messages", "authentication_error"), ("/v1/models", "invalid_request_error")],
)
def test_a_missing_key_is_told_in_the_envelope_of_the_path(locked: Served, target: str, type_: str) -> None:
    error = json.loads(ask(locked, request("POST", target)).body)["error"]
    assert error["type"] == type_
    assert error.get("code", "invalid_api_key") == "invalid_api_key"


def test_without_a_key_everything_is_open() -> None:
    with serve(ApiKey(routed())) as served:
        assert ask(served, request(target="/v1/models")).status == 200


def test_an_empty_key_is_no_key_to_set() -> None:
    with pytest.raises(ValueError, match="empty"):
        ApiKey(hello, key="")


# Body


class Reader:
    """Reads whole bodies and remembers how much it was given."""

    def __init__(self) -> None:
        self.num_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_bytes = 0
        async for chunk in Request(scope, receive).stream():
            self.num_bytes += len(chunk)
        await Response(str(self.num_bytes))(scope, receive, send)


MAX_BYTES = 100_000


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader()


@pytest.fixture(scope="module")
def limited(reader: Reader) -> Iterator[Served]:
    with serve(RequestId(BodyLimit(reader, max_bytes=MAX_BYTES))) as served:
        yield served


def test_a_body_of_just_the_limit_is_served(limited: Served, reader: Reader) -> None:
    assert ask(limited, request("POST", body=b"a" * MAX_BYTES)).body == b"%d" % MAX_BYTES


def test_a_body_declared_too_large_is_refused_before_it_comes(limited: Served, reader: Reader) -> None:
    reader.num_bytes = -1
    with limited.connect() as client:
        client.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100001\r\n\r\n")
        reply = read_reply(client, "POST")
        assert reply.status == 413
        assert json.loads(reply.body)["error"]["type"] == "request_too_large"
        assert reply.headers["x-request-id"]
        assert is_closed(client)
    assert reader.num_bytes == -1


def test_a_client_that_sends_before_it_reads_gets_its_answer_and_a_clean_end(limited: Served) -> None:
    with limited.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000\r\n\r\n" + b"a" * 10_000_000)
        assert read_reply(client, "POST").status == 413
        assert client.recv(1000) == b""


def test_a_client_that_waits_to_be_told_to_send_is_told_not_to(limited: Served) -> None:
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 100001\r\n\r\n"
    assert ask(limited, head).status == 413


@pytest.mark.parametrize("chunk", [1_000, 65_536, 1_000_000])
def test_a_chunked_body_is_refused_at_the_limit(limited: Served, reader: Reader, chunk: int) -> None:
    sent = 0
    with limited.connect() as client:
        client.sendall(b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        while sent < 5_000_000:
            try:
                client.sendall(b"%x\r\n" % chunk + b"a" * chunk + b"\r\n")
            except OSError:
                break
            sent += chunk
        reply = read_reply(client, "POST")
        assert reply.status == 413
        assert json.loads(reply.body)["error"]["code"] == "request_too_large"
        assert reply.headers["connection"] == "close"
        assert is_closed(client)
    assert reader.num_bytes <= MAX_BYTES
    assert ask(limited, request("POST", body=b"a")).body == b"1"


def test_the_application_cannot_answer_a_refused_request_again(caplog: pytest.LogCaptureFixture) -> None:
    async def stubborn(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        await Response("second answer", 200)(scope, receive, send)

    with serve(BodyLimit(stubborn, max_bytes=10)) as served, served.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nb\r\n" + b"a" * 11 + b"\r\n0\r\n\r\n")
        assert read_reply(client, "POST").status == 413
        assert client.recv(1000) == b""
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "deflate", "br", "zstd", "identity, gzip", "gzip, identity", "nonsense"])
def test_a_coded_body_is_refused(limited: Served, coding: str) -> None:
    reply = ask(limited, request("POST", "/v1/chat/completions", body=b"a", content_encoding=coding))
    assert reply.status == 415
    assert json.loads(reply.body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("coding", ["identity", "Identity", ""])
def test_a_plain_body_is_plain_whether_it_says_so_or_not(limited: Served, coding: str) -> None:
    assert ask(limited, request("POST", body=b"a", content_encoding=coding)).status == 200


def test_a_client_that_leaves_while_it_sends_is_no_fault(limited: Served, caplog: pytest.LogCaptureFixture) -> None:
    client = limited.connect()
    client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\na")
    wait_until(lambda: limited.num_connections() == 1, within_s=1)
    cut(client)
    wait_until(lambda: limited.num_connections() == 0, within_s=1)
    assert ask(limited, request()).status == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
