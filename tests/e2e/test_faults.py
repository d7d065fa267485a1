"""What a client reads when the server fails: a status while there is one to give, one error in the stream after that."""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from mlx_manager import app
from mlx_manager.config import Config
from mlx_manager.core.errors import EngineFault, InvalidField, ModelLoadFailed, Overloaded, TimedOut
from mlx_manager.core.events import TextDelta
from mlx_manager.core.exchange import Exchange
from mlx_manager.gateway.gateway import Gateway
from tests.e2e.serving import Running, serve_thread
from tests.gateway.scripted import HELLO, STARTED, WAIT, Scripted, Step

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]},
    COMPLETIONS: {"model": "tiny", "prompt": "Hello"},
}
SECRET = RuntimeError("/home/somebody/secret.safetensors")
MAX_REQUESTS = 2


class Faulty:
    """A server whose models do what a test says."""

    def __init__(self, running: Running, backend: Scripted, told: list[Exchange]) -> None:
        self.running = running
        self.told = told
        self._backend = backend

    def play(self, *script: Step) -> None:
        self._backend.script = script
        self._backend.requests.clear()
        self.told.clear()

    @property
    def num_asked(self) -> int:
        return len(self._backend.requests)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    config = Config(port=0, data_dir=tmp_path_factory.mktemp("data"), models_dir=(Path("/nonexistent"),))
    backend, told = Scripted(), list[Exchange]()
    services = app.build_services(config)
    services = replace(services, gateway=Gateway(backend, max_requests=MAX_REQUESTS, listeners=(told.append,)))
    with serve_thread(app.application(services), config) as running:
        yield Faulty(running, backend, told)


def post(faulty: Faulty, path: str, **fields: Any) -> httpx2.Response:
    with faulty.running.http() as http:
        return http.post(path, json=BODY[path] | fields)


@pytest.mark.parametrize(
    ("error", "status", "type_", "code", "retry"),
    [
        (EngineFault("The engine failed."), 500, "server_error", None, "true"),
        (SECRET, 500, "server_error", None, None),
        (TimedOut("It took too long."), 504, "server_error", "timeout", None),
        (Overloaded("Too many.", retry_after_s=3), 503, "server_error", "queue_full", None),
        (ModelLoadFailed("It would not load."), 503, "server_error", "model_load_failed", "false"),
        (InvalidField("No.", param="stop"), 400, "invalid_request_error", "invalid_value", "false"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Exception) else "",
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_before_the_first_event_a_failure_is_a_status(
    faulty: Faulty, stream: bool, path: str, error: Exception, status: int, type_: str, code: str | None, retry: str | None
) -> None:
    faulty.play(error)
    response = post(faulty, path, stream=stream)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    assert response.headers.get("x-should-retry") == retry
    assert response.headers.get("retry-after") == ("3" if isinstance(error, Overloaded) else None)
    body = response.json()
    assert (body["error"]["type"], body["error"]["code"]) == (type_, code)
    assert "secret" not in response.text
    assert "RuntimeError" not in response.text
    assert [e.outcome for e in faulty.told] == ["client_error" if status == 400 else "server_error"]


@pytest.mark.parametrize("error", [EngineFault("The engine failed."), SECRET], ids=["engine", "unexpected"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("before", [(STARTED,), (STARTED, TextDelta("Hel"))])
def test_after_it_a_failure_is_the_last_event_of_the_stream(faulty: Faulty, before: tuple[Step, ...], path: str, error: Exception) -> None:
    faulty.play(*before, error)
    response = post(faulty, path, stream=True)
    assert response.status_code == 200
    frames = [f.removeprefix("data: ") for f in response.text.split("\n\n") if f.startswith("data: ")]
    last = json.loads(frames[-1])
    assert last.keys() == {"error"}
    assert last["error"].keys() == {"message", "type", "param", "code"}
    assert last["error"]["type"] == "server_error"
    assert "[DONE]" not in response.text
    assert "secret" not in response.text
    assert response.text.count('"error"') == 1
    assert [e.outcome for e in faulty.told] == ["server_error"]


def test_a_whole_reply_that_fails_half_way_is_a_status_too(faulty: Faulty) -> None:
    faulty.play(STARTED, TextDelta("Hel"), EngineFault("The engine failed."))
    assert post(faulty, CHAT).status_code == 500


@pytest.mark.parametrize("script", [(STARTED,), (STARTED, TextDelta("Hel")), HELLO[:-1]])
def test_a_stream_that_falls_silent_ends_in_an_error(faulty: Faulty, script: tuple[Step, ...]) -> None:
    faulty.play(*script)
    text = post(faulty, CHAT, stream=True).text
    assert '"error"' in text
    assert "[DONE]" not in text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("before", [(), (STARTED,)])
def test_what_nobody_expected_is_in_the_log_with_its_traceback(
    faulty: Faulty, caplog: pytest.LogCaptureFixture, before: tuple[Step, ...], stream: bool
) -> None:
    faulty.play(*before, SECRET)
    uvicorn = logging.getLogger("uvicorn")  # it does not pass on to the root
    uvicorn.addHandler(caplog.handler)
    try:
        post(faulty, CHAT, stream=stream)
        deadline = time.monotonic() + 10
        while not (errors := [r for r in caplog.records if r.levelno >= logging.ERROR]):  # the client hears of it first
            assert time.monotonic() < deadline
    finally:
        uvicorn.removeHandler(caplog.handler)
    (record,) = errors
    assert record.exc_info is not None
    assert record.exc_info[1] is SECRET


def test_the_sdk_raises_what_comes_in_the_stream(faulty: Faulty) -> None:
    faulty.play(STARTED, TextDelta("Hel"), EngineFault("The engine failed."))
    seen = list[str]()
    with faulty.running.openai() as client:
        texts = (chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**BODY[CHAT], stream=True))
        with pytest.raises(openai.APIError, match="The engine failed") as raised:
            seen.extend(texts)
    assert seen == ["", "Hel"]
    assert raised.value.type == "server_error"


def test_the_sdk_tries_once_more_after_an_engine_fault_and_not_twice(faulty: Faulty) -> None:
    faulty.play(EngineFault("The engine failed."))
    with faulty.running.openai(max_retries=2) as client, pytest.raises(openai.InternalServerError):
        client.chat.completions.create(**BODY[CHAT])
    assert faulty.num_asked == 2


def test_more_requests_than_there_is_room_for_are_told_when_to_come_back(faulty: Faulty) -> None:
    faulty.play(STARTED, WAIT)
    with faulty.running.http() as http:
        with http.stream("POST", CHAT, json=BODY[CHAT] | {"stream": True}), http.stream("POST", CHAT, json=BODY[CHAT] | {"stream": True}):
            refused = http.post(CHAT, json=BODY[CHAT])
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "queue_full"
            assert 1 <= int(refused.headers["retry-after"]) <= 120
            assert http.get("/api/status").json()["num_in_flight"] == MAX_REQUESTS
            assert http.get("/health").status_code == http.get("/health/ready").status_code == 200
        deadline = time.monotonic() + 10
        while http.get("/api/status").json()["num_in_flight"]:
            assert time.monotonic() < deadline
    assert sorted(e.outcome for e in faulty.told) == ["cancelled", "cancelled", "server_error"]


def test_a_completion_opens_its_stream_before_there_is_anything_to_say(faulty: Faulty) -> None:
    faulty.play(STARTED, WAIT)
    with faulty.running.http() as http, http.stream("POST", COMPLETIONS, json=BODY[COMPLETIONS] | {"stream": True}) as response:
        assert next(response.iter_bytes()) == b": keep-alive\n\n"
