"""Downloads by the real server in a process of its own, from a Hub on loopback: watched, killed, started again, and chatted with."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.e2e.serving import FIXTURE_MODELS, GENEROUS_S, serve_process
from tests.hub.hub_server import HubServer, serving_hub

MODEL = "someone/small"
WEIGHTS = (FIXTURE_MODELS / "qwen3" / "model.safetensors").read_bytes()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving_hub() as server:
        server.add(MODEL, FIXTURE_MODELS / "qwen3")
        yield server


def settings(hub: HubServer) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}


def wait_for(http: httpx2.Client, id: str, *states: str, more_than: int = 0) -> dict[str, Any]:
    deadline = time.monotonic() + GENEROUS_S
    while True:
        now: dict[str, Any] = http.get(f"/api/downloads/{id}").json()
        if now["state"] in states and now["done_bytes"] > more_than:
            return now
        assert time.monotonic() < deadline, now
        time.sleep(0.02)


def events(http: httpx2.Client, since: str | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(id, name, data) of each, as they come."""
    with http.stream("GET", "/api/downloads/events", headers={} if since is None else {"last-event-id": since}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        event: dict[str, str] = {}
        for line in response.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                event[name] = value
            elif "data" in event:
                yield event["id"], event["event"], json.loads(event["data"])
                event = {}


def test_a_download_survives_a_kill_goes_on_at_the_byte_and_then_chats_by_its_name(hub: HubServer, tmp_path: Path) -> None:
    hub.add("someone/paused", FIXTURE_MODELS / "llama")
    hub.bytes_per_s = 500_000
    with serve_process(tmp_path, settings(hub) | {"MLX_MANAGER_MAX_DOWNLOADS": "1"}) as running, running.http() as http:
        started = http.post("/api/downloads", json={"model": MODEL})
        assert (started.status_code, started.json()["model"]) == (202, MODEL)
        second = http.post("/api/downloads", json={"model": "someone/paused"}).json()
        paused = second["id"]
        assert second["state"] == "queued"
        assert http.post(f"/api/downloads/{paused}/pause").json()["state"] == "paused"
        wait_for(http, started.json()["id"], "downloading", more_than=1 << 20)
        assert running.process is not None
        os.kill(running.process.pid, signal.SIGKILL)
        running.process.wait()
    have = (tmp_path / "hub" / "models--someone--small" / "blobs" / f"{hashlib.sha256(WEIGHTS).hexdigest()}.part").stat().st_size
    hub.bytes_per_s = None
    with serve_process(tmp_path, settings(hub)) as running, running.http() as http, running.openai() as client:
        done = wait_for(http, started.json()["id"], "done")
        assert hub.fetched(WEIGHTS)[-1].start == have > 0
        assert done["done_bytes"] == done["total_bytes"]
        assert http.get(f"/api/downloads/{paused}").json()["state"] == "paused"
        assert MODEL in {m.id for m in client.models.list()}
        reply = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=4)
        assert reply.model == MODEL
        assert reply.usage is not None
        assert reply.usage.completion_tokens > 0
        assert "hf_secret" not in running.log
    assert all(one.headers["authorization"] == "Bearer hf_secret" for one in hub.asked("hub"))
    assert not any("hf_secret" in str(one) for one in hub.asked("cdn"))


def test_two_watchers_see_one_transfer_and_one_that_comes_back_hears_what_it_missed(hub: HubServer, tmp_path: Path) -> None:
    hub.bytes_per_s = 2_000_000
    with serve_process(tmp_path, settings(hub)) as running, running.http() as http, running.http() as other:
        first, second = events(http), events(other)
        position, name, state = next(first)
        assert (name, state) == ("state", {"downloads": []})
        assert next(second)[1] == "state"
        with running.http() as asking:
            id = asking.post("/api/downloads", json={"model": MODEL}).json()["id"]
            assert asking.post("/api/downloads", json={"model": MODEL}).json()["id"] == id
        for watching in (first, second):
            seen = [one for _, _, data in _until_done(watching) for one in data["downloads"]]
            assert {one["id"] for one in seen} == {id}
            done = [one["done_bytes"] for one in seen]
            assert done == sorted(done)
            assert len(set(done)) > 2
        first.close()
        second.close()
        assert len(hub.fetched(WEIGHTS)) == 1
        with running.http() as later:
            assert later.delete(f"/api/downloads/{id}").status_code == 204
            missed = events(later, position)
            assert next(missed)[1:] == ("changes", {"downloads": [], "removed": [id]})
            missed.close()
        # A server that is told to end does not wait for those who watch.
        with running.http() as last, last.stream("GET", "/api/downloads/events") as response:
            began = time.monotonic()
            assert running.process is not None
            running.process.send_signal(signal.SIGTERM)
            response.read()
        assert running.process.wait(timeout=20) in (0, -signal.SIGTERM)
        assert time.monotonic() - began < 15


def _until_done(watching: Iterator[tuple[str, str, dict[str, Any]]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for event in watching:
        yield event
        if any(one["state"] == "done" for one in event[2]["downloads"]):
            return


def test_every_refusal_is_a_problem_that_names_its_field(hub: HubServer, tmp_path: Path) -> None:
    hub.add("someone/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.add("someone/gated", FIXTURE_MODELS / "llama", gated="auto")
    with serve_process(tmp_path, settings(hub) | {"MLX_MANAGER_HUB_TIMEOUT_S": "3"}) as running, running.http() as http:

        def refused(body: Any, status: int, code: str, pointer: str | None) -> str:
            reply = http.post("/api/downloads", json=body)
            told = reply.json()
            assert (reply.status_code, reply.headers["content-type"]) == (status, "application/problem+json")
            assert told["type"].endswith(f":{code}")
            assert [error["pointer"] for error in told.get("errors", [])] == ([] if pointer is None else [pointer])
            return str(told["detail"])

        refused({}, 400, "missing_required_parameter", "model")
        refused({"model": 7}, 400, "invalid_type", "model")
        refused({"model": MODEL, "revison": "x"}, 400, "unknown_field", "revison")
        refused({"model": "../etc"}, 400, "invalid_value", "model")
        assert "can bring code along" in refused({"model": "someone/pickled"}, 400, "unusable_model", "model")
        assert "accept them at" in refused({"model": "someone/gated"}, 403, "hub_refused", None)
        refused({"model": "someone/nothing"}, 404, "invalid_request_error", "model")
        assert http.get("/api/downloads/nothing").status_code == 404
        unknown = http.delete("/api/downloads/nothing?kep=true")
        assert (unknown.status_code, unknown.json()["errors"][0]["pointer"]) == (400, "kep")
        hub.silent = {"hub"}
        assert "did not answer in time" in refused({"model": MODEL}, 503, "hub_unavailable", None)
        hub.closing.set()
        assert http.get("/api/downloads").json() == {"downloads": []}
        assert http.get("/health").json() == {"status": "ok"}
