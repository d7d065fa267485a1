"""What is counted and traced: Prometheus series at `/metrics`, OpenTelemetry spans through Logfire. No prompt is in either.

Nothing leaves the machine unless a Logfire token or an OTLP endpoint is configured.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import logfire
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mlx_manager.core.exchange import Exchange
from mlx_manager.inference.engine.engine import Engine
from mlx_manager.inference.memory import RELIEF
from mlx_manager.inference.pool import Pool

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900)


def has_destination(environ: Mapping[str, str]) -> bool:
    """Whether spans would go anywhere. Making them for nobody takes as long as a quarter of what else is done for a request in Python."""
    return any(
        name == "LOGFIRE_TOKEN" or (name.startswith("OTEL_EXPORTER_OTLP") and name.endswith("ENDPOINT"))
        for name, value in environ.items()
        if value
    )


def configure_logfire(processors: Sequence[SpanProcessor] = ()) -> None:
    """Silent without `LOGFIRE_TOKEN`; honours `OTEL_EXPORTER_OTLP_ENDPOINT`. `processors` hear of every span as well."""
    logfire.configure(
        send_to_logfire="if-token-present",
        console=False,
        service_name="mlx-manager",
        inspect_arguments=False,
        distributed_tracing=True,  # a client that traces may see its requests go on in here; unset, the first such one makes a warning
        additional_span_processors=processors,
    )


class Metrics:
    """Series of one process. `record` is an exchange listener."""

    def __init__(self, engines: Callable[[], Mapping[str, Engine]], further: Sequence[Collector] = ()) -> None:
        self._registry = CollectorRegistry()
        for collector in (_EngineCollector(engines), *further):
            self._registry.register(collector)
        labels = ("model", "backend")
        self._requests = Counter("mlx_manager_requests", "Requests, by how they ended.", (*labels, "outcome"), registry=self._registry)
        self._tokens = Counter("mlx_manager_tokens", "Tokens of finished requests.", (*labels, "kind"), registry=self._registry)
        self._duration = Histogram(
            "mlx_manager_request_seconds", "From arrival to the last event.", labels, buckets=_SECONDS, registry=self._registry
        )
        self._first_token = Histogram(
            "mlx_manager_time_to_first_token_seconds",
            "From submission to the first token.",
            labels,
            buckets=_SECONDS,
            registry=self._registry,
        )

    def record(self, exchange: Exchange) -> None:
        # A refused request may name any model: only names of models that somebody answers for become labels.
        model = "" if exchange.backend is None else exchange.model
        backend = "" if exchange.backend is None else exchange.backend
        self._requests.labels(model, backend, exchange.outcome).inc()
        self._tokens.labels(model, backend, "prompt").inc(exchange.usage.prompt)
        self._tokens.labels(model, backend, "cached").inc(exchange.usage.cached)
        self._tokens.labels(model, backend, "completion").inc(exchange.usage.completion)
        self._duration.labels(model, backend).observe(exchange.duration_s)
        timing = exchange.timing
        if timing is not None and timing.first_token is not None:
            self._first_token.labels(model, backend).observe(timing.first_token - timing.submitted)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engines' own counters when asked."""

    def __init__(self, engines: Callable[[], Mapping[str, Engine]]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("mlx_manager_running_sequences", "Sequences being computed.", labels=("model",))
        waiting = GaugeMetricFamily("mlx_manager_waiting_sequences", "Sequences waiting for a place.", labels=("model",))
        steps = CounterMetricFamily("mlx_manager_decode_steps", "Forward passes that decoded.", labels=("model",))
        decoded = CounterMetricFamily("mlx_manager_decoded_tokens", "Tokens decoded.", labels=("model",))
        prefilled = CounterMetricFamily("mlx_manager_prefilled_tokens", "Prompt tokens computed.", labels=("model",))
        faults = CounterMetricFamily("mlx_manager_engine_faults", "Times an engine failed its requests.", labels=("model",))
        hits = CounterMetricFamily("mlx_manager_prefix_tokens", "Prompt tokens that were computed already.", labels=("model",))
        fetched = CounterMetricFamily("mlx_manager_prefix_disk_blocks", "Blocks read back from the disk.", labels=("model",))
        preempted = CounterMetricFamily("mlx_manager_preemptions", "Times a sequence gave way to another.", labels=("model",))
        evicted = CounterMetricFamily("mlx_manager_kv_evictions", "Blocks of prefixes that gave way to others.", labels=("model",))
        blocks = GaugeMetricFamily("mlx_manager_kv_blocks", "Blocks of keys and values.", labels=("model", "kind", "state"))
        allocated = GaugeMetricFamily("mlx_manager_kv_bytes", "Memory allocated for keys and values.", labels=("model",))
        for model, engine in self._engines().items():
            cache = engine.cache_state
            hits.add_metric([model], engine.counters.cached_tokens)
            fetched.add_metric([model], engine.counters.fetched_blocks)
            preempted.add_metric([model], cache.num_preemptions)
            evicted.add_metric([model], cache.num_evictions)
            free = cache.num_blocks - cache.num_held - cache.num_cached
            for state, count in (("held", cache.num_held), ("cached", cache.num_cached), ("free", free)):
                blocks.add_metric([model, cache.kind, state], count)
            allocated.add_metric([model], cache.allocated_bytes)
            running.add_metric([model], engine.num_running)
            waiting.add_metric([model], engine.num_waiting)
            steps.add_metric([model], engine.counters.decode_steps)
            decoded.add_metric([model], engine.counters.decoded_tokens)
            prefilled.add_metric([model], engine.counters.prefilled_tokens)
            faults.add_metric([model], engine.counters.faults)
        yield from (running, waiting, steps, decoded, prefilled, faults, hits, fetched, preempted, evicted, blocks, allocated)


class PoolCollector(Collector):
    """Reads the pool's own counters when asked."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        loads = CounterMetricFamily("mlx_manager_model_loads", "Loads of models, by how they ended.", labels=("outcome",))
        evictions = CounterMetricFamily("mlx_manager_model_evictions", "Models that left memory, by why.", labels=("reason",))
        refusals = CounterMetricFamily("mlx_manager_memory_refusals", "Requests that there was no memory for.")
        hot = GaugeMetricFamily("mlx_manager_models_hot", "Models in memory.")
        part = GaugeMetricFamily("mlx_manager_memory_bytes", "Memory of the models, by part.", labels=("part",))
        limit = GaugeMetricFamily("mlx_manager_memory_limit_bytes", "What all models together may take.")
        relief = GaugeMetricFamily("mlx_manager_memory_relief", "1 while this is done because little memory is left.", labels=("step",))
        counters, memory = self._pool.counters, self._pool.memory()
        for outcome, number in counters.loads.items():
            loads.add_metric([outcome], number)
        for reason, number in counters.evictions.items():
            evictions.add_metric([reason], number)
        refusals.add_metric([], counters.refusals)
        hot.add_metric([], sum(status.state == "ready" for status in self._pool.statuses()))
        parts = {
            "weights": memory.weights,
            "adapters": memory.adapters,
            "kv": memory.kv,
            "prefill": memory.prefill,
            "kv_in_use": memory.kv_in_use,
            "in_use": memory.in_use,
            "cached": memory.cached,
        }
        for name, num_bytes in parts.items():
            if num_bytes is not None:
                part.add_metric([name], num_bytes)
        if memory.limit is not None:
            limit.add_metric([], memory.limit)
        for step in RELIEF:
            relief.add_metric([step], step in memory.relief)
        yield from (loads, evictions, refusals, hot, part, limit, relief)


def trace_exchange(exchange: Exchange) -> None:
    """Spans of one request: its operation (`generate`, …), and inside it `queue`, `prefill` and `decode`, where it got that far."""
    tracer = trace.get_tracer("mlx_manager")
    wall_ns, monotonic = time.time_ns(), time.monotonic()

    def ns(moment: float) -> int:
        return wall_ns - int((monotonic - moment) * 1e9)

    attributes = {
        "gen_ai.operation.name": exchange.operation,
        "gen_ai.request.model": exchange.asked,
        "gen_ai.response.model": exchange.model,
        "gen_ai.usage.input_tokens": exchange.usage.prompt,
        "gen_ai.usage.output_tokens": exchange.usage.completion,
        "mlx_manager.backend": "" if exchange.backend is None else exchange.backend,
        "mlx_manager.outcome": exchange.outcome,
        "mlx_manager.cached_tokens": exchange.usage.cached,
    }
    root = tracer.start_span(exchange.operation, start_time=ns(monotonic - exchange.duration_s), attributes=attributes)
    timing = exchange.timing
    if timing is not None:
        context = trace.set_span_in_context(root)
        moments = (timing.submitted, timing.admitted, timing.first_token, timing.finished)
        for name, begin, end in zip(("queue", "prefill", "decode"), moments, moments[1:], strict=False):
            if begin is not None and end is not None:
                tracer.start_span(name, context=context, start_time=ns(begin)).end(ns(end))
    root.end(wall_ns)
