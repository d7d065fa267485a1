"""The pool over real sockets: what its settings do, what is managed by HTTP and by commands, and what is counted."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI

from tests.e2e.serving import GENEROUS_S, Running, serve_process

SETTINGS = {
    "MLX_MANAGER_MAX_MEMORY": "60MB",
    "MLX_MANAGER_KV_CACHE_GIB": "0.005",
    "MLX_MANAGER_PREFILL_BUDGET": "256",
    "MLX_MANAGER_MAX_BATCH": "4",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With room for two of the models."""
    with serve_process(tmp_path_factory.mktemp("pool"), SETTINGS | {"MLX_MANAGER_MEMORY_WAIT_S": "0.3"}) as running:
        yield running


@pytest.fixture(autouse=True)
def _empty(server: Running) -> None:
    with server.http() as http:
        for model in http.get("/api/models").json()["models"]:
            if model["state"] == "ready":
                assert http.post(f"/api/models/{model['id']}/unload").status_code == 200
            http.patch(f"/api/models/{model['id']}", json={"pinned": False, "keep_alive": None})


def say(server: Running, model: str, max_tokens: int = 4) -> str:
    with server.openai() as client:
        return client.completions.create(model=model, prompt="Hello, I am", max_tokens=max_tokens, temperature=0).choices[0].text


def pool_of(server: Running) -> dict[str, Any]:
    with server.http() as http:
        told = http.get("/api/models").json()
    return {"memory": told["memory"], **{m["id"]: m for m in told["models"]}}


def events(server: Running, model: str, body: object = None) -> list[tuple[str, dict[str, Any]]]:
    with server.http() as http, http.stream("POST", f"/api/models/{model}/load", json={} if body is None else body) as reply:
        assert reply.status_code == 200
        lines = list(reply.iter_lines())
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    return list(zip(names, data, strict=True))


@pytest.mark.requirement("8.1", "8.2", "SRV-02", "F7")
def test_a_third_model_takes_the_place_of_the_least_recently_used(server: Running) -> None:
    said = say(server, "qwen3")
    say(server, "llama")
    say(server, "mistral")
    pool = pool_of(server)
    assert [pool[name]["state"] for name in ("qwen3", "llama", "mistral")] == ["cold", "ready", "ready"]
    assert pool["memory"]["limit"] == 60_000_000
    parts = [pool["memory"][part] for part in ("weights", "adapters", "kv", "prefill")]
    assert pool["memory"]["taken"] == sum(parts) <= 60_000_000
    assert say(server, "qwen3") == said
    assert server.metric("mlx_manager_model_evictions_total", reason="room") >= 2
    assert server.metric("mlx_manager_models_hot") == 2
    assert server.metric("mlx_manager_memory_bytes", part="weights") == pool_of(server)["memory"]["weights"]


@pytest.mark.requirement("D-07", "F6")
def test_of_every_model_it_is_told_whether_it_fits_and_the_sum(server: Running) -> None:
    fit = pool_of(server)["qwen3"]["fit"]
    assert fit["needed"] == fit["weights"] + fit["adapter"] + fit["kv"] + fit["prefill"]
    assert (fit["limit"], fit["kv_for_context"]) == (60_000_000, 2048 * 4096)
    assert fit["verdict"] == "tight", "its keys and values are for less than the whole context"
    assert pool_of(server)["tiny_bert"]["fit"]["verdict"] == "fits"


@pytest.mark.requirement("D-07", "Q2")
def test_who_finds_no_room_is_told_the_numbers_and_when_to_come_back(server: Running) -> None:
    with server.http() as http:
        for name in ("qwen3", "llama"):
            assert events(server, name, {"pinned": True})[-1][0] == "ready"
        body = {"model": "mistral", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        reply = http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "model_loading"
        assert "needs" in reply.json()["error"]["message"]
        assert "are available" in reply.json()["error"]["message"]
        assert int(reply.headers["retry-after"]) >= 1
        overloaded = http.post("/v1/messages", json=body, headers={"anthropic-version": "2023-06-01"})
        assert (overloaded.status_code, overloaded.json()["error"]["type"]) == (529, "overloaded_error")
        with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as stream:
            assert stream.status_code == 200, "the reply is opened before anything slow begins"
            assert "are available" in "".join(stream.iter_text())
    failed = events(server, "mistral")
    assert failed[-1][0] == "failed"
    assert (failed[-1][1]["status"], failed[-1][1]["code"]) == (503, "model_loading")
    assert pool_of(server)["mistral"]["state"] == "cold", "nothing is wrong with it"


@pytest.mark.requirement("Q2", "D-02", "D-22")
def test_a_load_that_has_to_wait_for_others_says_for_how_much(server: Running) -> None:
    for_ever = {"prompt": "apple", "max_tokens": 3000, "temperature": 0, "logit_bias": {"300": 100}, "stream": True}
    with server.http() as http, ExitStack() as streams:
        for name in ("qwen3", "llama"):
            stream = streams.enter_context(http.stream("POST", "/v1/completions", json=for_ever | {"model": name}))
            pieces = stream.iter_bytes()
            streams.callback(pieces.close)
            next(pieces)
        told = events(server, "mistral")
        assert [name for name, _ in told][-2:] == ["progress", "failed"]
        queued = told[-2][1]
        assert queued["phase"] == "queued"
        assert queued["needed_bytes"] > queued["available_bytes"] > 0
        assert [pool_of(server)[name]["busy"] for name in ("qwen3", "llama")] == [1, 1]
    assert events(server, "mistral")[-1][0] == "ready"


@pytest.mark.requirement("8.6", "API-05", "P.4")
def test_a_load_tells_how_far_it_is_and_who_leaves_for_it(server: Running) -> None:
    told = events(server, "qwen3")
    assert [name for name, _ in told][-1] == "ready"
    assert {data["phase"] for name, data in told if name == "progress"} <= {"loading", "evicting", "queued"}
    assert told[0][0] == "progress"
    ready = told[-1][1]
    assert (ready["id"], ready["state"], ready["pinned"], ready["busy"]) == ("qwen3", "ready", False, 0)
    assert ready["memory"]["weights"] > 3_000_000
    assert [name for name, _ in events(server, "qwen3")][-1] == "ready", "it is there already"


@pytest.mark.requirement("API-05")
def test_a_model_is_pinned_and_given_a_time_by_its_own_address(server: Running) -> None:
    with server.http() as http:
        told = http.patch("/api/models/qwen3", json={"pinned": True, "keep_alive": "5m"}).json()
        assert (told["pinned"], told["keep_alive_s"], told["state"]) == (True, 300, "cold")
        assert http.patch("/api/models/qwen3", json={"pinned": False}).json()["keep_alive_s"] == 300
        say(server, "qwen3")
        shown = pool_of(server)["qwen3"]
        assert shown["expires_at"] == pytest.approx(time.time() + 300, abs=30)
        assert shown["last_used"] == pytest.approx(time.time(), abs=30)
        assert shown["uses"] >= 1
        http.patch("/api/models/qwen3", json={"keep_alive": 0})
        deadline = time.monotonic() + GENEROUS_S
        while pool_of(server)["qwen3"]["state"] != "cold":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert http.patch("/api/models/qwen3", json={"keep_alive": -1}).json()["keep_alive_s"] is None


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"pinned": "yes"}, "/pinned"),
        ({"keep_alive": "soon"}, "/keep_alive"),
        ({"keep_alive": True}, "/keep_alive"),
        ({"keep_alive": []}, "/keep_alive"),
        ({"pin": True}, "/pin"),
    ],
)
def test_what_cannot_be_set_is_refused_by_its_field_and_nothing_is_lost(server: Running, body: object, pointer: str) -> None:
    with server.http() as http:
        http.patch("/api/models/qwen3", json={"keep_alive": 7})
        for reply in (http.patch("/api/models/qwen3", json=body), http.post("/api/models/qwen3/load", json=body)):
            assert reply.status_code == 400
            assert reply.headers["content-type"] == "application/problem+json"
            assert reply.json()["errors"][0]["pointer"] == pointer
        assert pool_of(server)["qwen3"]["keep_alive_s"] == 7
        assert pool_of(server)["qwen3"]["state"] == "cold"


def test_a_model_that_is_not_there_is_not_found(server: Running) -> None:
    with server.http() as http:
        for reply in (
            http.patch("/api/models/org/nobody", json={"pinned": True}),
            http.post("/api/models/org/nobody/load"),
            http.post("/api/models/org/nobody/unload"),
        ):
            assert (reply.status_code, reply.headers["content-type"]) == (404, "application/problem+json")
            assert "org/nobody" in reply.json()["detail"]


@pytest.mark.requirement("8.6", "F3", "Q2")
def test_unloading_lets_a_stream_finish_and_the_next_request_loads_anew(server: Running) -> None:
    with server.openai(_strict_response_validation=False) as client, server.http() as http, ThreadPoolExecutor(1) as threads:
        # A bias that has it go on for ever.
        stream = client.completions.create(
            model="qwen3", prompt="apple", max_tokens=600, temperature=0, logit_bias={"300": 100}, stream=True
        )
        chunks = iter(stream)
        next(chunks)
        assert pool_of(server)["qwen3"]["busy"] == 1
        unloading = threads.submit(http.post, "/api/models/qwen3/unload")
        while (state := pool_of(server)["qwen3"]["state"]) != "unloading":
            assert state == "ready"
        *_, last = chunks
        assert last.choices[0].finish_reason == "length"
        assert unloading.result(GENEROUS_S).json()["state"] == "cold"
    assert say(server, "qwen3") != ""


@pytest.mark.requirement("F4", "Q1")
def test_eight_who_ask_for_a_cold_model_at_once_have_it_loaded_once(server: Running) -> None:
    before = server.metric("mlx_manager_model_loads_total", outcome="ready")
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(lambda _: say(server, "qwen3"), range(8)))) == 1
    assert server.metric("mlx_manager_model_loads_total", outcome="ready") == before + 1


@pytest.mark.requirement("API-04")
def test_the_list_of_models_says_of_each_what_it_is_and_how(server: Running, client_of_pool: OpenAI) -> None:
    say(server, "qwen3")
    models = {m.id: m.model_dump() for m in client_of_pool.models.list()}
    assert (models["qwen3"]["state"], models["llama"]["state"]) == ("ready", "cold")
    assert models["qwen3"]["context_length"] == 4096
    assert models["tiny_bert"]["kind"] == "embedding"
    assert models["tiny_bert"]["features"] == ["embeddings", "rerank"]


@pytest.fixture
def client_of_pool(server: Running) -> Iterator[OpenAI]:
    with server.openai() as client:
        yield client


@pytest.mark.requirement("F2")
def test_health_answers_while_models_come_and_go(server: Running) -> None:
    slowest, done = 0.0, threading.Event()

    def probe() -> None:
        nonlocal slowest
        with server.http() as http:
            while not done.is_set():
                began = time.monotonic()
                assert http.get("/health").status_code == 200
                slowest = max(slowest, time.monotonic() - began)
                time.sleep(0.02)

    thread = threading.Thread(target=probe)
    thread.start()
    for name in ("qwen3", "llama", "mistral", "glm4"):
        say(server, name)
    done.set()
    thread.join()
    assert slowest < 2.0, "of a busy machine; idle it is a few milliseconds"


# ---- commands


def command(server: Running, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_manager", *arguments, "--host", server.url],
        capture_output=True,
        text=True,
        timeout=GENEROUS_S,
        env=os.environ | {"PYTHONWARNINGS": "error"},
        check=False,
    )


def test_a_model_is_loaded_shown_and_unloaded_by_commands(server: Running) -> None:
    loaded = command(server, "load", "qwen3", "--pin", "--keep-alive", "5m")
    assert (loaded.returncode, loaded.stdout.startswith("qwen3 is loaded (")) == (0, True), loaded.stderr
    shown = command(server, "ps")
    assert shown.returncode == 0
    assert "qwen3" in shown.stdout
    assert "ready, pinned" in shown.stdout
    assert "of 60.0 MB taken" in shown.stdout
    told = json.loads(command(server, "ps", "--json").stdout)
    assert next(m for m in told["models"] if m["id"] == "qwen3")["keep_alive_s"] == 300
    stopped = command(server, "stop", "qwen3", "--json")
    assert (stopped.returncode, json.loads(stopped.stdout)["state"]) == (0, "cold")
    assert command(server, "unload", "qwen3").stdout == "qwen3 is not in memory.\n"
    assert json.loads(command(server, "load", "qwen3", "--json").stdout)["state"] == "ready"


def test_a_command_that_cannot_do_it_says_why(server: Running) -> None:
    for arguments in (("load", "nobody"), ("stop", "nobody")):
        failed = command(server, *arguments)
        assert (failed.returncode, failed.stdout) == (1, "")
        assert "The model 'nobody' does not exist here" in failed.stderr.replace("\n", " ")
    wrong = command(server, "load", "qwen3", "--keep-alive", "soon")
    assert wrong.returncode == 1
    assert "'soon' is not a time" in wrong.stderr.replace("\n", " ")
    assert command(server, "load", " ").returncode == 2
    nowhere = Running(1)
    assert [command(nowhere, *a).returncode for a in (("load", "qwen3"), ("stop", "qwen3"), ("ps",))] == [3, 3, 3]


# ---- starts and ends


@pytest.mark.requirement("F6", "CONF-02", "F10")
def test_what_is_preloaded_stays_and_what_aborted_the_process_is_left_out_at_the_next_start(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    settings = SETTINGS | {"MLX_MANAGER_PRELOAD": "qwen3,llama", "MLX_MANAGER_WHEN_FULL": "refuse", "MLX_MANAGER_EVICTION": "lfu"}
    with serve_process(data, settings, program="tests.e2e.aborting") as running:
        assert running.process is not None
        assert running.process.wait(GENEROUS_S) == -signal.SIGABRT
    assert len(list((data / "loading").iterdir())) == 1
    with serve_process(data, settings) as running:
        deadline = time.monotonic() + GENEROUS_S
        with running.http() as http:
            while http.get("/health/ready").status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        pool = pool_of(running)
        assert (pool["qwen3"]["state"], pool["qwen3"]["error"]) == ("failed", "the server ended while it was being loaded")
        assert (pool["llama"]["state"], pool["llama"]["pinned"]) == ("ready", True)
        assert say(running, "qwen3") != "", "who asks for it gets it"
        assert list((data / "loading").iterdir()) == []
        with running.http() as http:
            reply = http.post("/v1/completions", json={"model": "mistral", "prompt": "a", "max_tokens": 1})
        assert reply.status_code == 503, "both are pinned, and nobody is to wait"

        with running.http() as http:
            for name in ("qwen3", "llama"):
                http.patch(f"/api/models/{name}", json={"pinned": False})
        for name in ("qwen3", "qwen3", "llama", "mistral"):
            say(running, name)
        pool = pool_of(running)
        assert [pool[name]["state"] for name in ("qwen3", "llama", "mistral")] == ["ready", "cold", "ready"], "llama was asked least often"


@pytest.mark.requirement("F6", "K1")
def test_a_server_can_keep_nothing_and_take_a_share_of_the_machine(tmp_path: Path) -> None:
    with serve_process(tmp_path, {"MLX_MANAGER_KEEP_ALIVE": "0", "MLX_MANAGER_MAX_MEMORY": "50%"}) as running:
        assert say(running, "qwen3") != ""
        deadline = time.monotonic() + GENEROUS_S
        while (pool := pool_of(running))["qwen3"]["state"] != "cold":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert running.metric("mlx_manager_model_evictions_total", reason="idle") == 1
        assert pool["memory"]["limit"] == pytest.approx(psutil.virtual_memory().total / 2, rel=0.01)
        assert pool["qwen3"]["keep_alive_s"] == 0
