"""The witness sees what goes wrong: else the tests beside this one could not fail by it."""

import httpx2
import pytest

from tests.clients.witness import Exchange, Witness
from tests.e2e.serving import MODEL, Running

SSE = {"content-type": "text/event-stream; charset=utf-8"}


@pytest.fixture(autouse=True)
def wire(witnessed: tuple[Running, object]) -> None:
    """Without the check that nothing failed."""


def seen(status: int, reply: str, **headers: str) -> Exchange:
    return Exchange("POST", "/v1/responses", {}, "{}", status, headers, reply, 0.1)


@pytest.mark.parametrize(
    "event",
    [
        '{"error":{"message":"no","type":"server_error","param":null,"code":null}}',
        '{"type":"error","error":{"type":"api_error","message":"no"}}',
        '{"type":"response.failed","response":{"status":"failed"}}',
    ],
)
def test_an_error_inside_a_stream_is_a_failure(event: str) -> None:
    assert Exchange("POST", "/v1/x", {}, "{}", 200, SSE, f"data: {event}\n\n", 0.1).failure is not None
    assert Exchange("POST", "/v1/x", {}, "{}", 200, SSE, 'data: {"choices":[]}\n\ndata: [DONE]\n\n', 0.1).failure is None


def test_so_is_a_status_and_so_is_no_reply_at_all() -> None:
    assert seen(200, "{}").failure is None
    assert seen(400, "{}").failure is not None
    assert seen(0, "").failure is not None


def test_what_a_refused_request_said_is_written_down(witnessed: tuple[Running, object], server: Running) -> None:
    running, path = witnessed
    witness = Witness(running, path, path.stat().st_size)  # type: ignore[arg-type, attr-defined]
    with server.http() as http:
        ask(http, num_ctx=4096)
        ask(http, temperature=7)
    good, bad = witness.exchanges("/v1/chat")
    assert (good.failure, good.ignored) == (None, {"num_ctx"})
    assert good.prompt[0] > 0
    assert (bad.status, bad.body["temperature"]) == (400, 7)
    assert len(witness.failures()) == 1


def ask(http: httpx2.Client, **fields: object) -> None:
    http.post("/v1/chat/completions", json={"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4, **fields})
