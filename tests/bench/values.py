"""Observations made by hand."""

from mlx_manager.bench.machine import Machine
from mlx_manager.bench.results import CeilingCell, Cell, Results, Target, Workload
from mlx_manager.bench.samples import Sample, Usage
from mlx_manager.bench.scenarios import Trial

MACHINE = Machine("Linux 6 x86_64", "A CPU", 2, 2**34, "3.11.7", (("mlx", "0.32.4"),), "abc123", "mlx-manager bench --url http://x")
OURS = Target("ours", "http://127.0.0.1:1", "tiny", api_key="sk-secret")
PEER = Target("peer", "http://127.0.0.1:2/v1", "tiny", flags="peer --fast")


def work(concurrency: int = 1, requests: int = 1, **changes: object) -> Workload:
    return Workload(128, 64, concurrency, requests, **changes)  # type: ignore[arg-type]


def sample(*events_s: float, tokens: int | None = None, cached: int | None = None, error: str | None = None) -> Sample:
    usage = None if tokens is None else Usage(100, tokens, cached)
    return Sample(0.0, events_s, max(events_s, default=0.0), usage, None if error else "length", error)


def cell(target: Target, workload: Workload, repeat: int = 0, *, tok_s: float = 10.0, ttft_s: float = 0.1) -> Cell:
    return Cell(target.name, workload, repeat, 10.0, (sample(ttft_s, ttft_s + 0.2, tokens=round(tok_s * 10)),))


def results(
    *seen: Cell | Trial,
    targets: tuple[Target, ...] = (OURS, PEER),
    stopped: str | None = None,
    ceiling: tuple[CeilingCell, ...] = (),
) -> Results:
    cells = tuple(one for one in seen if isinstance(one, Cell))
    trials = tuple(one for one in seen if isinstance(one, Trial))
    return Results(
        targets=targets,
        workloads=tuple(dict.fromkeys(one.workload for one in cells)),
        repeats=max(one.repeat for one in seen) + 1,
        seed=0,
        cells=cells,
        machine=MACHINE,
        started_at="2026-01-01T00:00:00+00:00",
        stopped=stopped,
        scenarios=tuple(dict.fromkeys(one.scenario for one in trials)),
        trials=trials,
        ceiling=ceiling,
    )
