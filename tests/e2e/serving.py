"""The real server in a process of its own, and in a thread where a test puts a part of its own in."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from anthropic import Anthropic
from fastapi import FastAPI
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from mlx_manager import app
from mlx_manager.config import Config

# The same tests hold for other checkpoints of these names.
FIXTURE_MODELS = Path(os.environ.get("TEST_MODELS_DIR", Path(__file__).parents[1] / "fixtures" / "models"))
MODEL = "qwen3"
GENEROUS_S = 120.0
# The same model with a context of so many tokens, so that filling it is quick.
SMALL_WINDOW = 64
SMALL_WINDOW_MODEL = "small-window"


@dataclass(frozen=True)
class Running:
    """`log` is what the process has written so far."""

    port: int
    process: subprocess.Popen[bytes] | None = None
    log_path: Path | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        assert self.log_path is not None
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def openai(self, **options: object) -> OpenAI:
        settings: dict[str, object] = {"max_retries": 0, "timeout": GENEROUS_S, "_strict_response_validation": True, **options}
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", **settings)  # type: ignore[arg-type]

    def anthropic(self, **options: object) -> Anthropic:
        settings: dict[str, object] = {"max_retries": 0, "timeout": GENEROUS_S, "_strict_response_validation": True, **options}
        return Anthropic(base_url=self.url, api_key="none", **settings)  # type: ignore[arg-type]

    def http(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=GENEROUS_S, trust_env=False)

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=GENEROUS_S)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a series over the labels that are not given; 0 if there is none yet."""
        with self.http() as http:
            text = http.get("/metrics").text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def is_idle(self) -> bool:
        with self.http() as http:
            in_flight = http.get("/api/status").json()["num_in_flight"]
        return in_flight == self.metric("mlx_manager_running_sequences") == self.metric("mlx_manager_waiting_sequences") == 0

    def wait_until_idle(self, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not self.is_idle():
            assert time.monotonic() < deadline, "something still runs"
            time.sleep(0.02)


def make_small_window_model(folder: Path) -> None:
    model = folder / SMALL_WINDOW_MODEL
    model.mkdir(parents=True)
    for file in (FIXTURE_MODELS / MODEL).iterdir():
        (model / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": SMALL_WINDOW}))


@contextmanager
def serve_process(data_dir: Path, settings: Mapping[str, str] | None = None, *, program: str = "tests.e2e.process") -> Iterator[Running]:
    """`python -m` that program on a free port, stopped by its pid."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLX_MANAGER_", "HF_", "LOGFIRE_", "OTEL_"))} | {
        "HF_HUB_CACHE": str(data_dir / "hub"),
        "HF_HUB_OFFLINE": "1",
        "MLX_MANAGER_LM_STUDIO_DIR": str(data_dir / "lm-studio"),
        "PYTHONWARNINGS": "error",
        "MLX_MANAGER_PORT": "0",
        "MLX_MANAGER_DATA_DIR": str(data_dir),
        "MLX_MANAGER_MODELS_DIR": str(FIXTURE_MODELS),
        **(settings or {}),
    }
    log_path = data_dir / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", program], stdout=log, stderr=log, env=environment)
    try:
        yield Running(_port(process, log_path), process, log_path)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def _port(process: subprocess.Popen[bytes], log_path: Path) -> int:
    deadline = time.monotonic() + GENEROUS_S
    while time.monotonic() < deadline and process.poll() is None:
        _, found, rest = log_path.read_text().partition("running on http://127.0.0.1:")
        if found and (port := rest.split()[0]).isdigit() and "\n" in rest:
            return int(port)
        time.sleep(0.02)
    raise AssertionError(f"the server did not start:\n{log_path.read_text()}")


@contextmanager
def serve_thread(application: FastAPI, config: Config) -> Iterator[Running]:
    """`app.Server` in a thread of this process; port 0 takes a free one."""
    server = app.Server(application, config)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        deadline = time.monotonic() + GENEROUS_S
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        port: int = server.servers[0].sockets[0].getsockname()[1]
        yield Running(port)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        assert not thread.is_alive()
