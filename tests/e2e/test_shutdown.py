"""A signal ends the server, and not the replies that it is giving."""

import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

from tests.e2e.serving import GENEROUS_S, MODEL, Running, serve_process

ENDLESS = {"model": MODEL, "prompt": "apple apple", "temperature": 0, "logit_bias": {"300": 100}, "stream": True}


def wait_until_ended(running: Running) -> None:
    assert running.process is not None
    assert running.process.wait(timeout=GENEROUS_S) in (0, -signal.SIGTERM)
    assert "Application shutdown complete" in running.log
    assert "ERROR" not in running.log
    assert "Traceback" not in running.log


def is_refused(running: Running) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", running.port), timeout=1):
            return False
    except TimeoutError:  # it waits to be accepted, on a machine that has other things to do
        return False
    except ConnectionError:  # or reset, if it was waiting to be accepted
        return True


def frames(text: str) -> list[Any]:
    data = [f.removeprefix("data: ") for f in text.split("\n\n") if f.startswith("data: ")]
    return [f if f == "[DONE]" else json.loads(f) for f in data]


def test_a_stream_that_runs_is_finished_and_nobody_new_is_served(tmp_path: Path) -> None:
    with serve_process(tmp_path) as running, running.http() as http:
        with http.stream("POST", "/v1/completions", json=ENDLESS | {"max_tokens": 1000}) as response:
            pieces = response.iter_text()
            text = next(pieces)
            assert running.process is not None
            running.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + GENEROUS_S
            while not is_refused(running):
                assert time.monotonic() < deadline
                time.sleep(0.02)  # thousands of connections would be what it is busy with
            text += "".join(pieces)
        assert frames(text)[-1] == "[DONE]"
        assert frames(text)[-2]["choices"][0]["finish_reason"] == "length"
        wait_until_ended(running)


def test_what_is_not_finished_in_time_ends_in_an_error(tmp_path: Path) -> None:
    # The time is up long before the reply is.
    with serve_process(tmp_path, {"MLX_MANAGER_DRAIN_S": "0.3"}) as running, running.http() as http:
        with http.stream("POST", "/v1/completions", json=ENDLESS | {"max_tokens": 4000, "n": 8}) as response:
            pieces = response.iter_text()
            text = next(pieces)
            assert running.process is not None
            running.process.send_signal(signal.SIGTERM)
            text += "".join(pieces)
        last = frames(text)[-1]
        assert last["error"]["type"] == "server_error"
        assert "shutting down" in last["error"]["message"]
        assert "[DONE]" not in text
        wait_until_ended(running)
