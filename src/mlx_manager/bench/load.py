"""Compares targets: workloads and scenarios in turn on each, repeat by repeat.

A workload is a closed loop: each of `concurrency` workers sends its next request when its last has ended.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from time import perf_counter

from mlx_manager.bench.ceiling import Ceiling
from mlx_manager.bench.client import Ask, Client, Limits
from mlx_manager.bench.machine import Machine, this_machine
from mlx_manager.bench.prompts import WordScale, texts
from mlx_manager.bench.results import CeilingCell, Cell, Results, Target, Workload
from mlx_manager.bench.samples import Sample
from mlx_manager.bench.scenarios import Scenario, Trial, is_for, warm_up
from mlx_manager.bench.trials import Prioritise, by_endpoint, run

PROBE_WORDS = (16, 128)

Turn = Callable[[], Awaitable[Cell | Trial | CeilingCell | None]]
"""None of a warm-up."""


async def compare(
    targets: Sequence[Target],
    workloads: Sequence[Workload] = (),
    repeats: int = 3,
    *,
    scenarios: Sequence[Scenario] = (),
    seed: int = 0,
    limits: Limits | None = None,
    machine: Machine | None = None,
    ceiling: Ceiling | None = None,
    prioritise: Prioritise = by_endpoint,
    on_done: Callable[[Cell | Trial | CeilingCell], None] | None = None,
) -> Results:
    """Everything on every target, `repeats` times, targets in turn: A B, B A, A B …, so that what the machine does meanwhile
    hits all of them. All targets get the same prompts in a repeat, and new ones in the next. The ceiling, if there is one, has
    its turn at the end of each repeat of a workload.

    Before each workload and scenario every target gets a short unmeasured warm-up. The same seed gives the same prompts: against
    a server that kept its prefix cache since the last run take another one. Raises ValueError for names or work given twice.
    """
    work: list[Workload | Scenario] = [*workloads, *scenarios]
    if len({target.name for target in targets}) < len(targets) or len(set(work)) < len(work):
        raise ValueError("targets need different names, and workloads and scenarios must differ")
    if not targets or not work or repeats < 1:
        raise ValueError("a comparison needs a target, a workload or scenario, and a repeat")
    limits = limits or Limits()
    deadline = perf_counter() + limits.total_s
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    machine = machine or await asyncio.to_thread(this_machine)
    scale = WordScale()
    if scenarios or any(not workload.prompts for workload in workloads):
        scale = await _word_scale(targets, seed, limits, deadline)
    done: list[Cell | Trial | CeilingCell] = []

    def add(one: Cell | Trial | CeilingCell) -> None:
        done.append(one)
        if on_done is not None:
            on_done(one)

    stopped = None
    for position, repeat, order in _schedule(len(work), repeats, targets):
        one, practice, salt = work[position], f"{seed}/{position}/warm-up", f"{seed}/{position}/{repeat}"
        turns: list[Turn]
        if isinstance(one, Workload):
            prompts = _prompts(one, scale, salt)
            if repeat == 0:
                await _warm_up(order, ceiling, one, scale, practice, limits, deadline)
            turns = [partial(measure, target, one, prompts, repeat=repeat, limits=limits, deadline=deadline) for target in order]
            if ceiling is not None:
                turns.insert(len(turns) if repeat % 2 == 0 else 0, partial(ceiling.measure, one, prompts, repeat))
        else:
            turns = []
            for target in (target for target in order if is_for(one, subject=target == targets[0])):
                if repeat == 0:
                    turns.append(partial(_practise, target, one, scale, practice, prioritise, limits, deadline))
                turns.append(partial(_trial, target, one, repeat, scale, salt, prioritise, limits, deadline))
        for turn in turns:
            if perf_counter() >= deadline:
                stopped = f"the time limit of {limits.total_s:.0f} s was reached"
                break
            if (seen := await turn()) is not None:
                add(seen)
    return Results(
        targets=tuple(targets),
        workloads=tuple(workloads),
        repeats=repeats,
        seed=seed,
        cells=tuple(one for one in done if isinstance(one, Cell)),
        machine=machine,
        started_at=started_at,
        stopped=stopped,
        scenarios=tuple(scenarios),
        trials=tuple(one for one in done if isinstance(one, Trial)),
        ceiling=tuple(one for one in done if isinstance(one, CeilingCell)),
    )


async def _warm_up(
    targets: Sequence[Target], ceiling: Ceiling | None, workload: Workload, scale: WordScale, salt: str, limits: Limits, deadline: float
) -> None:
    short = replace(workload, requests=min(workload.requests, workload.concurrency), max_tokens=min(workload.max_tokens, 16))
    prompts = _prompts(short, scale, salt)
    for target in targets:
        await measure(target, short, prompts, limits=limits, deadline=deadline)
    if ceiling is not None:
        await ceiling.measure(short, prompts, 0)


async def _practise(
    target: Target, scenario: Scenario, scale: WordScale, salt: str, prioritise: Prioritise, limits: Limits, deadline: float
) -> None:
    await _trial(target, warm_up(scenario), 0, scale, salt, prioritise, limits, deadline)


async def _trial(
    target: Target, scenario: Scenario, repeat: int, scale: WordScale, salt: str, prioritise: Prioritise, limits: Limits, deadline: float
) -> Trial:
    async with Client(target, limits, deadline) as client:
        return await run(client, scenario, repeat, scale, salt, prioritise)


async def measure(
    target: Target,
    workload: Workload,
    prompts: Sequence[str],
    *,
    repeat: int = 0,
    limits: Limits | None = None,
    deadline: float | None = None,
) -> Cell:
    """One cell. Of `prompts` the first primes, if the workload says so, the others are sent in turn. `deadline` is a
    `perf_counter` time; by default the limits' total from now."""
    limits = limits or Limits()
    deadline = perf_counter() + limits.total_s if deadline is None else deadline
    primer, *measured = prompts
    async with Client(target, limits, deadline) as client:
        if workload.primed:
            await client.ask(Ask(primer, 1, workload.temperature))
        client.start_clock()
        numbers = iter(range(workload.requests))
        samples: list[Sample] = []

        async def worker() -> None:
            for number in numbers:
                if client.is_out_of_time:
                    return
                samples.append(await client.ask(Ask(measured[number % len(measured)], workload.max_tokens, workload.temperature)))

        async with asyncio.TaskGroup() as workers:
            for _ in range(min(workload.concurrency, workload.requests)):
                workers.create_task(worker())
    wall_s = max((sample.start_s + sample.end_s for sample in samples), default=0.0)
    return Cell(target.name, workload, repeat, wall_s, tuple(sorted(samples, key=lambda sample: sample.start_s)))


def _schedule(num_workloads: int, repeats: int, targets: Sequence[Target]) -> Iterator[tuple[int, int, Sequence[Target]]]:
    """(position of the workload, repeat, targets in the order of their turn). Every other repeat runs backwards, so that no
    target always comes first, on the machine as the last cell left it."""
    for position in range(num_workloads):
        for repeat in range(repeats):
            yield position, repeat, targets if repeat % 2 == 0 else targets[::-1]


def _prompts(workload: Workload, scale: WordScale, salt: str) -> list[str]:
    """One more than the requests: the first is for priming, and like the others in all but its own words."""
    if workload.prompts:
        return [workload.prompts[0], *workload.prompts]
    return texts(workload.prefix, scale.num_words(workload.prompt_tokens), workload.requests + 1, salt)


async def _word_scale(targets: Sequence[Target], seed: int, limits: Limits, deadline: float) -> WordScale:
    """From the first target that answers two probes with a usage; a token a word if none does."""
    for target in targets:
        seen: list[tuple[int, int]] = []
        for num_words in PROBE_WORDS:
            probe = Workload(prompt_tokens=num_words, max_tokens=1, concurrency=1, requests=1)
            prompts = texts("unique", num_words, 2, f"{seed}/probe/{num_words}")
            cell = await measure(target, probe, prompts, limits=limits, deadline=deadline)
            seen.extend((num_words, sample.usage.prompt_tokens) for sample in cell.completed if sample.usage is not None)
        if len(seen) == 2:
            return WordScale.through(*seen)
    return WordScale()
