"""Results for people (terminal, Markdown) and for later (JSON). All three say the same, machine and command included."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from pydantic import TypeAdapter
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mlx_manager.bench.results import Figures, Results, Target, Workload
from mlx_manager.bench.samples import Range, Spread
from mlx_manager.bench.scenarios import Measure, Scenario, is_for, measures, title

SPEED_UP_FLOOR = 1.05
"""A median below this is called no speed-up: runs on a shared machine differ by more than the rest."""

UNEQUAL_OUTPUT = 0.1
SEEN_BEFORE = 0.1
CEILING = "the ceiling"
ABOVE_CEILING = 1.05
"""A server cannot reach more than the machine gives: above this, by more than chance, something is wrong with the measurement."""

STORED: TypeAdapter[Results] = TypeAdapter(Results)


def table(results: Results) -> Group:
    """For a terminal: one table a shape of work and one a scenario, then what has to be said about them."""
    parts: list[Table | Text] = []
    for heading, columns, rows in _grids(results):
        grid = Table(title=escape(heading), title_justify="left")
        for name in columns:
            grid.add_column(escape(name), justify="left" if name == "Target" else "right")
        for row in rows:
            grid.add_row(*map(escape, row))
        parts.append(grid)
    return Group(*parts, *(Text(line) for line in [*notes(results), *_provenance(results)]))


def markdown(results: Results) -> str:
    lines: list[str] = []
    for heading, columns, rows in _grids(results):
        lines += [f"**{heading}**", "", _markdown_row(columns)]
        lines.append(_markdown_row([":--" if name == "Target" else "--:" for name in columns]))
        lines += [_markdown_row(row) for row in rows]
        lines.append("")
    lines += [f"- {line}" for line in notes(results)]
    lines += ["", *(f"- {line}" for line in _provenance(results)), ""]
    return "\n".join(lines)


def to_json(results: Results) -> str:
    """Every observation, and beside it the figures that follow, for readers that do not compute. Holds no API key."""
    stored = STORED.dump_python(results, mode="json", exclude={"targets": {"__all__": {"api_key"}}})
    figures = [
        {
            "target": target.name,
            "workload": asdict(workload),
            **asdict(results.figures(target, workload)),
            "share_of_ceiling": _plain(results.share_of_ceiling(target, workload)),
            "ratio": {
                peer.name: {
                    metric: _plain(results.ratio(target, peer, workload, metric)) for metric in ("output_tok_s", "ttft_p50", "gap_p95")
                }
                for peer in results.targets[1:]
                if target == results.targets[0]
            },
        }
        for workload in results.workloads
        for target in results.targets
    ]
    scenarios = [
        {
            "target": target.name,
            "scenario": asdict(scenario),
            "measures": {m.name: _plain(results.measured(target, scenario, m.name)) for m in measures(scenario)},
            "ratio": {
                peer.name: {m.name: _plain(results.scenario_ratio(target, peer, scenario, m.name)) for m in measures(scenario)}
                for peer in results.targets[1:]
                if target == results.targets[0]
            },
        }
        for scenario in results.scenarios
        for target in results.targets
        if results.trials_of(target, scenario)
    ]
    return json.dumps({"results": stored, "figures": figures, "scenarios": scenarios}, ensure_ascii=False, allow_nan=False)


def from_json(text: str) -> Results:
    """What `to_json` wrote, less the API keys. Raises ValueError for anything else."""
    document = json.loads(text)
    return STORED.validate_python(document["results"] if isinstance(document, dict) and "results" in document else document)


def notes(results: Results) -> list[str]:
    """What a reader of the numbers alone would miss."""
    return [
        *(line for target in results.targets for shape in results.shapes for line in _speed_up_notes(results, target, shape)),
        *(line for target in results.targets for line in _target_notes(results, target)),
        *_fairness_notes(results),
        *([] if results.stopped is None else [f"Incomplete: {results.stopped}."]),
    ]


def _speed_up_notes(results: Results, target: Target, shape: Workload) -> list[str]:
    measured = [(w.concurrency, up) for w in results.of_shape(shape) if w.concurrency > 1 and (up := results.speed_up(target, w))]
    if not measured:
        return []
    at_once, best = max(measured, key=lambda pair: pair[1].median)
    work = f", {_title(results, shape)}" if len(results.shapes) > 1 else ""
    if best.median < SPEED_UP_FLOOR or best.low <= 1:
        return [f"{target.name}{work}: no speed-up from concurrency: at best {_times(best)} of one at a time, at {at_once} at once."]
    return [f"{target.name}{work}: up to {_times(best)} the output tok/s of one at a time, at {at_once} at once."]


def _target_notes(results: Results, target: Target) -> list[str]:
    figures = [results.figures(target, workload) for workload in results.workloads]
    said: list[str] = []
    if any(f.counted_by == "events" for f in figures):
        said.append(
            f"{target.name}: did not send usage with every reply; its tok/s are partly stream events a second, which need not be tokens."
        )
    if errors := results.errors(target):
        common = "; ".join(f"{count} x {error}" for error, count in errors.most_common(3))
        said.append(f"{target.name}: {errors.total()} failed requests: {common}")
    if num_unsent := sum(f.num_unsent for f in figures):
        said.append(f"{target.name}: {num_unsent} requests were not sent before the time limit.")
    unique = [w for w in results.workloads if w.prefix == "unique" and not w.prompts]
    if any((results.figures(target, w).cached_part or 0.0) > SEEN_BEFORE for w in unique):
        said.append(f"{target.name}: answered part of the unique prompts from its cache: it has seen this seed before. Take another.")
    return said


def _fairness_notes(results: Results) -> list[str]:
    subject, *peers = results.targets
    said: list[str] = []
    for workload in results.workloads:
        ours = results.figures(subject, workload).output_tokens
        for peer in peers:
            theirs = results.figures(peer, workload).output_tokens
            if ours and theirs and abs(ours - theirs) > UNEQUAL_OUTPUT * max(ours, theirs):
                said.append(
                    f"At {workload.concurrency} at once {subject.name} wrote {ours:.0f} tokens a request and {peer.name} {theirs:.0f}: "
                    "their rates are not of the same work."
                )
    above = [
        f"{target.name} {share.median:.0%} at {workload.concurrency} at once"
        for workload in results.workloads
        for target in results.targets
        if (share := results.share_of_ceiling(target, workload)) is not None and share.median > ABOVE_CEILING
    ]
    if above:
        said.append(
            f"Above the ceiling: {', '.join(above)}. On a CPU mlx-manager can be, as it does not compute all that mlx-lm's way; "
            "else other work disturbed this run, or the model differs: take no shares from it."
        )
    if results.ceiling:
        said.append("The ceiling is mlx-lm's batch generator with the same prompts, in a process without HTTP.")
    if peers:
        said.append("Ratios: above 1 the first target is better; median of the repeats, each taken side by side (lowest-highest).")
    return said


def _provenance(results: Results) -> list[str]:
    """Where, with what and how."""
    return [
        results.machine.line,
        *(f"{t.name}: {t.model} at {t.url}{f', started as: {t.flags}' if t.flags else ''}" for t in results.targets),
        f"{results.started_at}, {results.repeats} repeats, seed {results.seed}",
        f"Command: {results.machine.command}",
    ]


def _title(results: Results, shape: Workload) -> str:
    counted = [f.prompt_tokens for t in results.targets for w in results.of_shape(shape) if (f := results.figures(t, w)).prompt_tokens]
    real = f"{min(counted):.0f}" if counted and round(min(counted)) == round(max(counted)) else ""
    real = real or (f"{min(counted):.0f}-{max(counted):.0f}" if counted else "uncounted")
    wanted = "given prompts" if shape.prompts else f"{shape.prefix} prompts of {shape.prompt_tokens} tokens"
    primed = ", prefix cached" if shape.primed else ""
    return f"{wanted} ({real} counted{primed}), at most {shape.max_tokens} tokens out, temperature {shape.temperature:g}"


def _grids(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    """(heading, columns, rows) of each table."""
    served = [(_title(results, shape), _columns(results), _rows(results, shape)) for shape in results.shapes]
    return served + [(title(one), _scenario_columns(results, one), _scenario_rows(results, one)) for one in results.scenarios]


def _columns(results: Results) -> list[str]:
    columns = [
        "At once",
        "Target",
        "tok/s",
        "Speed-up",
        "TTFT p50 / p95, ms",
        "Gap p50 / p95 / max, ms",
        "Out / request",
        "Cached",
        "Failed",
        *(["Of the ceiling"] if results.ceiling else []),
    ]
    return columns + [f"{what} ratio to {peer.name}" for peer in results.targets[1:] for what in ("tok/s", "TTFT")]


def _rows(results: Results, shape: Workload) -> list[list[str]]:
    rows: list[list[str]] = []
    for workload in results.of_shape(shape):
        for target in results.targets:
            share = [_share(results.share_of_ceiling(target, workload))] if results.ceiling else []
            cells = [*_cells(results.figures(target, workload)), *share, *_ratios(results, target, workload)]
            rows.append([str(workload.concurrency), target.name, *cells])
        if results.ceiling:
            row = [str(workload.concurrency), CEILING, _range(results.ceiling_tok_s(workload))]
            rows.append(row + [""] * (len(_columns(results)) - len(row)))
    return rows


def _scenario_columns(results: Results, scenario: Scenario) -> list[str]:
    titles = [one.title if one.unit == "share" else f"{one.title}, ms" for one in measures(scenario)]
    compared = [f"{measures(scenario)[0].title} ratio to {peer.name}" for peer in _peers_in(results, scenario)]
    return ["Target", *titles, "Failed", *compared]


def _scenario_rows(results: Results, scenario: Scenario) -> list[list[str]]:
    subject, peers = results.targets[0], _peers_in(results, scenario)
    rows: list[list[str]] = []
    for target in (subject, *peers):
        trials = results.trials_of(target, scenario).values()
        failed = f"{sum(trial.num_failed for trial in trials)} of {sum(len(trial.samples) for trial in trials)}"
        ratios = (results.scenario_ratio(subject, peer, scenario, measures(scenario)[0].name) for peer in peers)
        compared = ["-" if ratio is None else _times(ratio) for ratio in ratios] if target == subject else [""] * len(peers)
        measured = [_measured(one, results.measured(target, scenario, one.name)) for one in measures(scenario)]
        rows.append([target.name, *measured, failed, *compared])
    return rows


def _peers_in(results: Results, scenario: Scenario) -> Sequence[Target]:
    return results.targets[1:] if is_for(scenario, subject=False) else ()


def _measured(measure: Measure, value: Range | None) -> str:
    if value is None:
        return "-"
    return _times(value) if measure.unit == "share" else _range(Range(value.median * 1000, value.low * 1000, value.high * 1000))


def _cells(figures: Figures) -> list[str]:
    return [
        _range(figures.output_tok_s),
        "-" if figures.speed_up is None else _times(figures.speed_up),
        _spread_ms(figures.ttft_s, with_max=False),
        _spread_ms(figures.gap_s, with_max=True),
        "-" if figures.output_tokens is None else f"{figures.output_tokens:.0f}",
        "-" if figures.cached_part is None else f"{figures.cached_part:.0%}",
        f"{figures.num_failed} of {figures.num_completed + figures.num_failed}",
    ]


def _ratios(results: Results, target: Target, workload: Workload) -> list[str]:
    subject, *peers = results.targets
    if target != subject:
        return [""] * (2 * len(peers))
    ratios = (results.ratio(subject, peer, workload, metric) for peer in peers for metric in ("output_tok_s", "ttft_p50"))
    return ["-" if ratio is None else _times(ratio) for ratio in ratios]


def _range(value: Range | None) -> str:
    if value is None:
        return "-"
    return f"{value.median:.1f}" if value.low == value.high else f"{value.median:.1f} ({value.low:.1f}-{value.high:.1f})"


def _share(value: Range | None) -> str:
    if value is None:
        return "-"
    return f"{value.median:.0%}" if value.low == value.high else f"{value.median:.0%} ({value.low:.0%}-{value.high:.0%})"


def _times(value: Range) -> str:
    return f"{value.median:.2f}x" if value.low == value.high else f"{value.median:.2f}x ({value.low:.2f}-{value.high:.2f})"


def _spread_ms(value: Spread | None, *, with_max: bool) -> str:
    if value is None:
        return "-"
    shown = (value.p50, value.p95, value.max) if with_max else (value.p50, value.p95)
    return " / ".join(f"{seconds * 1000:.1f}" for seconds in shown)


def _plain(value: Range | None) -> dict[str, float] | None:
    return None if value is None else asdict(value)


def _markdown_row(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"
