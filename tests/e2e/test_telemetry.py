"""What is counted and traced, and what is in none of it: a prompt, a reply, a call to the world outside."""

import asyncio
import gzip
import logging
import queue
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from mlx_manager import app, telemetry
from mlx_manager.config import Config
from mlx_manager.core.errors import EngineFault
from mlx_manager.inference.engine.block_pool import BlockPool
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.engine import Engine, PendingStep
from mlx_manager.inference.engine.pace import Pace
from mlx_manager.inference.engine.prefix import PrefixKeys
from mlx_manager.inference.engine.scheduler import Plan, Policy, Scheduler
from mlx_manager.inference.engine.sequence import SequenceSpec, Token, TokenSampling
from mlx_manager.telemetry import Metrics
from tests.e2e.serving import FIXTURE_MODELS, MODEL, Running, serve_process, serve_thread
from tests.inference.engine.passes import KeepsNothing

SERIES = set(re.findall(r"`(mlx_manager_[a-z_]+)`", (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()))
ENDLESS = {"model": MODEL, "prompt": "apple apple", "max_tokens": 4000, "temperature": 0, "logit_bias": {"300": 100}, "stream": True}
CANARY = "xylophonquartz"


@pytest.fixture(scope="module")
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def traced(spans: InMemorySpanExporter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """In this process, so that its spans can be seen; two sequences at a time."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("LOGFIRE_TOKEN", raising=False)
        environment.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        telemetry.configure_logfire([SimpleSpanProcessor(spans)])
        config = Config(port=0, data_dir=tmp_path_factory.mktemp("data"), models_dir=(FIXTURE_MODELS,), max_batch=2)
        with serve_thread(app.build(config), config) as running:
            yield running


def values(running: Running) -> dict[str, float]:
    """Every documented series, summed over its labels; of a histogram its count."""
    with running.http() as http:
        families = text_string_to_metric_families(http.get("/metrics").text)
    sums = dict.fromkeys(SERIES, 0.0)
    for sample in (s for f in families for s in f.samples):
        name = sample.name.removesuffix("_count")
        if name in sums:
            sums[name] += sample.value
    return sums


def test_every_documented_series_moves(traced: Running) -> None:
    assert len(SERIES) >= 10
    before = values(traced)
    with traced.http() as http:
        assert http.post("/v1/completions", json=ENDLESS | {"max_tokens": 3, "stream": False}).status_code == 200
        assert http.post("/v1/completions", json=ENDLESS | {"model": "nobody"}).status_code == 404
        for _ in range(2):
            long = {"prompt": [300] * 70, "max_tokens": 1, "stream": False}
            assert http.post("/v1/completions", json=ENDLESS | long).status_code == 200
        with http.stream("POST", "/v1/completions", json=ENDLESS | {"n": 4}) as response:
            pieces = response.iter_bytes()  # forgetting it would close the connection
            next(pieces)
            busy = values(traced)
            deadline = time.monotonic() + 30
            while busy["mlx_manager_waiting_sequences"] != 2:
                assert time.monotonic() < deadline, busy
                busy = values(traced)
        traced.wait_until_idle(within_s=10)
    after = values(traced)
    gauges = {"mlx_manager_running_sequences", "mlx_manager_waiting_sequences"}
    assert {name: busy[name] for name in gauges} == dict.fromkeys(gauges, 2)
    assert {name: after[name] for name in gauges} == dict.fromkeys(gauges, 0)
    # A fault of the engine has a test of its own, below; nothing here is short of memory or has a disk. The limit may be known already.
    still = {name for name in SERIES - gauges - {"mlx_manager_memory_limit_bytes"} if after[name] <= before[name]}
    assert still == {
        "mlx_manager_engine_faults_total",
        "mlx_manager_preemptions_total",
        "mlx_manager_kv_evictions_total",
        "mlx_manager_prefix_disk_blocks_total",
        "mlx_manager_model_evictions_total",
        "mlx_manager_memory_refusals_total",
        "mlx_manager_memory_relief",
    }
    for outcome in ("ok", "client_error", "cancelled"):
        assert traced.metric("mlx_manager_requests_total", outcome=outcome) >= 1
    assert traced.metric("mlx_manager_requests_total", model="nobody") == 0


class Failing(KeepsNothing):
    """Forward passes that fail."""

    def queue(self, plan: Plan, unread: object = None) -> PendingStep:
        raise RuntimeError("no device")

    def read(self, pending: PendingStep) -> list[Token | None]:
        raise AssertionError


async def test_a_fault_of_an_engine_is_counted() -> None:
    device = Device()
    engine = Engine(device, Failing(), Scheduler(BlockPool(8), PrefixKeys("failing", "none"), Policy()), Pace(8, 1.0))
    metrics = Metrics(lambda: {"tiny": engine})
    device.start()
    try:
        device.post(lambda: device.attach(engine))
        stream = engine.submit([SequenceSpec((1,), 1, TokenSampling(seed=0))])
        with pytest.raises(EngineFault):
            await asyncio.wait_for(anext(stream), 30)
    finally:
        await asyncio.to_thread(device.stop)
    assert b'mlx_manager_engine_faults_total{model="tiny"} 1.0' in metrics.render()


def _spans_of_last_request(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    finished = [s for s in spans.get_finished_spans() if s.attributes is None or s.attributes.get("logfire.span_type") != "pending_span"]
    root = [s for s in finished if s.name == "generate"][-1]
    return {s.name: s for s in finished if s.context.trace_id == root.context.trace_id}


@pytest.mark.parametrize("variable", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_spans_go_to_the_collector_that_is_named(variable: str, tmp_path: Path) -> None:
    received: queue.Queue[bytes] = queue.Queue()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/v1/traces":
                received.put(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{collector.server_port}" + ("/v1/traces" if "TRACES" in variable else "")
        with serve_process(tmp_path, {variable: address, "OTEL_BSP_SCHEDULE_DELAY": "100"}) as running, running.http() as http:
            http.post("/v1/completions", json=ENDLESS | {"max_tokens": 2, "stream": False}).raise_for_status()
            told = b""
            while not all(name in told for name in (b"generate", b"prefill", b"decode")):
                told += received.get(timeout=30)
        collector.shutdown()
    assert b"apple" not in told


@pytest.mark.parametrize(
    ("environ", "is_wanted"),
    [
        ({"LOGFIRE_TOKEN": "t"}, True),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_SERVICE_NAME": "mine", "OTEL_EXPORTER_OTLP_HEADERS": "a=b"}, False),
    ],
)
def test_spans_are_made_where_somebody_is_named_who_gets_them(environ: dict[str, str], is_wanted: bool) -> None:
    assert telemetry.has_destination(environ) is is_wanted


def test_a_request_leaves_the_spans_of_its_stages(traced: Running, spans: InMemorySpanExporter) -> None:
    began = time.time_ns()
    with traced.http() as http:
        reply = http.post("/v1/completions", json=ENDLESS | {"max_tokens": 5, "stream": False, "prompt": [300] * 40}).json()
    found = _spans_of_last_request(spans)
    assert found.keys() >= {"generate", "queue", "prefill", "decode"}
    root = found["generate"]
    stages = [found[name] for name in ("queue", "prefill", "decode")]
    assert all(s.parent is not None and s.parent.span_id == root.context.span_id for s in stages)
    moments = [began, root.start_time, *(t for s in stages for t in (s.start_time, s.end_time)), root.end_time, time.time_ns()]
    slack_ns = 5_000_000  # between the two clocks
    assert all(a is not None and b is not None and a <= b + slack_ns for a, b in pairwise(moments))
    assert root.attributes is not None
    assert root.attributes["gen_ai.request.model"] == MODEL
    assert root.attributes["gen_ai.usage.input_tokens"] == reply["usage"]["prompt_tokens"] == 40
    assert root.attributes["gen_ai.usage.output_tokens"] == 5
    assert root.attributes["mlx_manager.outcome"] == "ok"


def _speak(running: Running) -> None:
    """The canary in every place that a client can put it."""
    with running.http() as http:
        chat = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"Repeat after me: {CANARY}"}],
            "max_tokens": 40,
            "stop": f"{CANARY}x",
        }
        tool = {"type": "function", "function": {"name": "f", "description": CANARY, "parameters": {"properties": {CANARY: {}}}}}
        for wrong in (
            {},
            {"stream": True},
            {"tools": [tool], "user": CANARY, "metadata": {"a": CANARY}},
            {"messages": [{"role": CANARY, "content": CANARY}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": CANARY, "x": CANARY}, {"type": CANARY}]}]},
            {"stop": CANARY * 50},
            {"tool_choice": CANARY},
            {"chat_template_kwargs": {CANARY: 1}},
        ):
            http.post("/v1/chat/completions", json=chat | wrong)
        http.post("/v1/completions", json={"model": MODEL, "prompt": CANARY, "max_tokens": 2, "echo": True})
        http.post("/v1/completions", json={"model": MODEL, "prompt": CANARY * 5000})
        http.post("/v1/completions", content=CANARY.encode())


def test_what_people_say_is_in_no_log_and_no_metric(server: Running) -> None:
    _speak(server)
    assert "DEBUG" in server.log
    assert CANARY not in server.log
    with server.http() as http:
        assert CANARY not in http.get("/metrics").text


def test_what_people_say_is_in_no_span(traced: Running, spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture) -> None:
    # The client's own libraries write what they send.
    for name in ("httpx2", "httpcore2", "openai"):
        caplog.set_level(logging.CRITICAL, name)
    with caplog.at_level(logging.DEBUG):
        _speak(traced)
    assert any(s.name == "generate" for s in spans.get_finished_spans())
    assert not [s.name for s in spans.get_finished_spans() if CANARY in s.to_json()]
    assert CANARY not in caplog.text


def test_nothing_leaves_this_machine(server: Running) -> None:
    _speak(server)
    assert "OUTSIDE" not in server.log
    assert server.process is not None
    for connection in psutil.Process(server.process.pid).net_connections("inet"):
        with suppress(AttributeError):  # no remote end
            assert connection.raddr.ip in ("127.0.0.1", "::1")
