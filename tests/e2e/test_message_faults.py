"""What an Anthropic client reads when the server fails or takes its time."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import pytest

from mlx_manager import app
from mlx_manager.config import Config
from mlx_manager.core.errors import EngineFault, ModelLoadFailed, Overloaded, TimedOut
from mlx_manager.core.events import TextDelta
from mlx_manager.gateway.gateway import Gateway
from tests.e2e.serving import Running, serve_thread
from tests.gateway.scripted import STARTED, WAIT, Scripted, Step

BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "Hello"}]}
MAX_REQUESTS = 2


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Scripted]]:
    """A server whose models do what a test says."""
    config = Config(port=0, data_dir=tmp_path_factory.mktemp("data"), models_dir=(Path("/nonexistent"),))
    backend = Scripted()
    services = replace(app.build_services(config), gateway=Gateway(backend, max_requests=MAX_REQUESTS))
    with serve_thread(app.application(services), config) as running:
        yield running, backend


@pytest.mark.parametrize(
    ("error", "status", "type_", "retry"),
    [
        (EngineFault("The engine failed."), 500, "api_error", "true"),
        (RuntimeError("/home/somebody/secret"), 500, "api_error", None),
        (TimedOut("It took too long."), 504, "timeout_error", None),
        (Overloaded("Too many.", retry_after_s=3), 529, "overloaded_error", None),
        (ModelLoadFailed("It would not load."), 529, "overloaded_error", "false"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Exception) else "",
)
@pytest.mark.parametrize("stream", [False, True])
def test_before_the_first_event_a_failure_is_a_status(
    faulty: tuple[Running, Scripted], stream: bool, error: Exception, status: int, type_: str, retry: str | None
) -> None:
    server, backend = faulty
    backend.script = (error,)
    with server.anthropic() as client, pytest.raises(anthropic.APIStatusError) as raised:
        client.messages.create(**BODY, stream=stream)
    assert raised.value.status_code == status
    assert raised.value.type == type_
    assert raised.value.response.headers.get("x-should-retry") == retry
    assert raised.value.response.headers.get("retry-after") == ("3" if isinstance(error, Overloaded) else None)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("before", [(STARTED,), (STARTED, TextDelta("Hel"))])
def test_after_it_a_failure_is_the_last_event_of_the_stream(faulty: tuple[Running, Scripted], before: tuple[Step, ...]) -> None:
    server, backend = faulty
    backend.script = (*before, EngineFault("The engine failed."))
    with server.http() as http:
        text = http.post("/v1/messages", json=BODY | {"stream": True}).text
    assert text.endswith('event: error\ndata: {"type":"error","error":{"type":"api_error","message":"The engine failed."}}\n\n')
    assert text.count('"error"') == 2
    assert "message_stop" not in text
    seen = list[str]()
    with (
        server.anthropic() as client,
        client.messages.stream(**BODY) as stream,
        pytest.raises(anthropic.APIStatusError, match=r"The engine failed\.") as raised,
    ):
        seen.extend(stream.text_stream)
    assert seen == [event.text for event in before if isinstance(event, TextDelta)]
    assert raised.value.type == "api_error"


def test_more_requests_than_there_is_room_for_are_told_that_the_server_is_overloaded(faulty: tuple[Running, Scripted]) -> None:
    server, backend = faulty
    backend.script = (STARTED, WAIT)
    waiting = BODY | {"stream": True}
    with server.http() as http, server.anthropic() as client:
        with (
            http.stream("POST", "/v1/messages", json=waiting),
            http.stream("POST", "/v1/messages", json=waiting),
            pytest.raises(anthropic.APIStatusError) as refused,
        ):
            client.messages.create(**BODY)
        server.wait_until_idle(within_s=10)
    assert (refused.value.status_code, refused.value.type) == (529, "overloaded_error")
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 120


def test_a_stream_opens_at_once_and_says_that_it_lives_while_nothing_else_is_to_be_said(faulty: tuple[Running, Scripted]) -> None:
    server, backend = faulty
    backend.script = (STARTED, WAIT)
    kinds = list[str]()
    with server.http() as http, http.stream("POST", "/v1/messages", json=BODY | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                kinds.append(json.loads(line.removeprefix("data: "))["type"])
            if len(kinds) == 3:
                break
    assert kinds == ["message_start", "ping", "ping"]
