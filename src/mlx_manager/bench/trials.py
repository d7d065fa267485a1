"""Runs one scenario on one target, once. What is asked and what follows from the answers is in `scenarios.py`."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Literal, assert_never

from mlx_manager.bench.client import Ask, Client, Extra
from mlx_manager.bench.prompts import WordScale, endings, short
from mlx_manager.bench.samples import Sample
from mlx_manager.bench.scenarios import Join, Overhead, PrefixHit, Prioritised, Scenario, SharedPrefix, Stall, Trial

Priority = Literal["high", "normal", "low"]
Prioritise = Callable[[Priority], Extra]

PROBE_TOKENS = 8
"""Of the reply to a short request: enough that a server which holds text back shows its first, few enough not to be load itself."""

PAUSE_S = (0.02, 0.12)
"""Between two probes, by lot: probes in step with the batch would always meet it at the same point."""

SETTLE_S = 0.5
RETRY_S = 0.25


def by_endpoint(priority: Priority) -> Extra:
    """For a server that was told which class each path has: what is low goes to /v1/completions."""
    return Extra(endpoint="completions" if priority == "low" else "chat/completions")


async def run(client: Client, scenario: Scenario, repeat: int, scale: WordScale, salt: str, prioritise: Prioritise = by_endpoint) -> Trial:
    """The same salt sends the same requests; those of another one share no prefix with them."""
    name = client.target.name
    questions, pauses = short(f"{salt}/probes"), random.Random(f"{salt}/pauses")
    client.start_clock()
    match scenario:
        case Join():
            load = _asks(short(f"{salt}/load"), scenario.load_tokens)
            probes, beside = await _beside(
                client, load, scenario.load, scenario.load, lambda: _one_by_one(client, questions, scenario.probes, pauses)
            )
            return Trial(name, scenario, repeat, probes, load=beside)
        case Stall():
            load = _asks(short(f"{salt}/load"), scenario.load_tokens)
            (text,) = endings(scale.num_words(scenario.prompt_tokens), 1, salt)

            async def long_prompt() -> tuple[Sample, ...]:
                await asyncio.sleep(SETTLE_S)
                return (await client.ask(Ask(text, PROBE_TOKENS)),)

            probes, beside = await _beside(client, load, scenario.load, scenario.load, long_prompt)
            return Trial(name, scenario, repeat, probes, load=beside)
        case SharedPrefix():
            texts = endings(scale.num_words(scenario.prompt_tokens), scenario.requests, salt)
            return Trial(name, scenario, repeat, tuple(await asyncio.gather(*(client.ask(Ask(text, PROBE_TOKENS)) for text in texts))))
        case Overhead():
            ask = Ask(next(questions), 1)
            await client.ask(ask)  # warm: neither the connection nor the prompt is new to the server
            return Trial(name, scenario, repeat, tuple([await client.ask(ask) for _ in range(scenario.requests)]))
        case PrefixHit():
            first, *again = endings(scale.num_words(scenario.prompt_tokens), 1 + scenario.hits, salt)
            before = (await client.ask(Ask(first, PROBE_TOKENS)),)
            return Trial(name, scenario, repeat, tuple([await client.ask(Ask(text, PROBE_TOKENS)) for text in again]), before=before)
        case Prioritised():
            high = prioritise("high")
            before = await _one_by_one(client, questions, scenario.probes, pauses, high)
            load = _asks(short(f"{salt}/load"), scenario.load_tokens, prioritise("low"))

            async def probing() -> tuple[Sample, ...]:
                await asyncio.sleep(SETTLE_S)
                return await _one_by_one(client, questions, scenario.probes, pauses, high)

            probes, beside = await _beside(client, load, scenario.load, 1, probing)
            return Trial(name, scenario, repeat, probes, before=before, load=beside)
        case _:
            assert_never(scenario)


def _asks(texts: Iterator[str], max_tokens: int, extra: Extra | None = None) -> Iterator[Ask]:
    return (Ask(text, max_tokens, extra=extra or Extra()) for text in texts)


async def _one_by_one(
    client: Client, questions: Iterator[str], count: int, pauses: random.Random, extra: Extra | None = None
) -> tuple[Sample, ...]:
    samples: list[Sample] = []
    for _ in range(count):
        await asyncio.sleep(pauses.uniform(*PAUSE_S))
        if client.is_out_of_time:
            break
        samples.append(await client.ask(Ask(next(questions), PROBE_TOKENS, extra=extra or Extra())))
    return tuple(samples)


async def _beside(
    client: Client, load: Iterator[Ask], num_streams: int, num_running: int, probing: Callable[[], Awaitable[tuple[Sample, ...]]]
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """(what probing saw, the load). The load is `num_streams` streams, each followed by another until probing is over; probing
    begins when `num_running` of them have shown a token. Streams run to their end, so that nothing of them is left on the server."""
    beside: list[Sample] = []
    running = asyncio.Semaphore(0)
    is_over = False

    async def stream() -> None:
        is_first = True

        def begun() -> None:
            nonlocal is_first
            if is_first:
                is_first = False
                running.release()

        while not is_over and not client.is_out_of_time:
            sample = await client.ask(next(load), begun)
            beside.append(sample)
            begun()  # one that failed is not waited for
            if sample.error is not None:
                await asyncio.sleep(RETRY_S)

    async with asyncio.TaskGroup() as streams:
        for _ in range(num_streams):
            streams.create_task(stream())
        for _ in range(num_running):
            await running.acquire()
        try:
            probes = await probing()
        finally:
            is_over = True
    return probes, tuple(sorted(beside, key=lambda sample: sample.start_s))
