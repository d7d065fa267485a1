import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from mlx_manager.core.errors import ContextTooLong, EngineFault, InvalidField, ModelNotFound, Overloaded, TimedOut
from mlx_manager.core.events import Event, Finished, TextDelta, Usage, collect
from mlx_manager.core.exchange import Exchange, Outcome
from mlx_manager.core.requests import EmbeddingRequest, GenerationRequest, RawPrompt, RerankRequest
from mlx_manager.gateway.gateway import Gateway
from mlx_manager.settings.names import Alias, Names
from mlx_manager.settings.profiles import Profile
from tests.gateway.scripted import HELLO, STARTED, WAIT, Scripted, Step

REQUEST = GenerationRequest("tiny", (RawPrompt("Hello"),))


EMBEDDING = EmbeddingRequest("tiny", ("Hello",), ("input",))
RERANK = RerankRequest("tiny", "Hello", ("Hello",))


async def measure(gate: Gateway, request: EmbeddingRequest | RerankRequest) -> None:
    await (gate.embed(request) if isinstance(request, EmbeddingRequest) else gate.rerank(request))


def gateway(*script: Step, max_requests: int = 4) -> tuple[Gateway, Scripted, list[Exchange]]:
    told: list[Exchange] = []
    backend = Scripted(*script)
    return Gateway(backend, max_requests=max_requests, listeners=(told.append,)), backend, told


async def read_all(gate: Gateway) -> list[Event]:
    return [event async for event in gate.stream(REQUEST)]


async def test_the_events_pass_through_and_the_request_is_told_of_once() -> None:
    gate, backend, told = gateway(*HELLO)
    assert tuple(await read_all(gate)) == HELLO
    (exchange,) = told
    assert (exchange.model, exchange.backend, exchange.outcome, exchange.error) == ("tiny", "scripted", "ok", None)
    assert exchange.usage == Usage(prompt=3, completion=1)
    assert exchange.duration_s >= 0
    assert gate.num_in_flight == backend.num_open == 0


@pytest.mark.requirement("B5")
async def test_a_name_is_resolved_once_and_told_with_what_it_stands_for() -> None:
    backend, told = Scripted(*HELLO, WAIT), list[Exchange]()
    names = Names({"tiny:p": Profile("tiny", "p", max_tokens=7)}, {"gpt": Alias("gpt", "tiny:p")})
    gate = Gateway(backend, max_requests=4, names=lambda: names, listeners=(told.append,))
    async with aclosing(gate.stream(replace(REQUEST, model="gpt"))) as events:
        await anext(events)
        names = Names()  # a change while it runs
        async for event in events:
            if isinstance(event, Finished):
                break
    assert backend.requests == [replace(REQUEST, max_tokens=7)]
    backend.script = HELLO
    assert [event async for event in gate.stream(replace(REQUEST, model="gpt"))] == list(HELLO)
    names = Names({}, {"gpt": Alias("gpt", "other")})
    for request in (EMBEDDING, RERANK):
        await measure(gate, replace(request, model="gpt"))
    assert [(exchange.asked, exchange.model) for exchange in told] == [("gpt", "tiny"), ("gpt", "gpt"), ("gpt", "other"), ("gpt", "other")]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (InvalidField("no", param="stop"), "client_error"),
        (ContextTooLong(limit=1, tokens=2), "client_error"),
        (ModelNotFound("tiny", []), "client_error"),
        (TimedOut("no"), "server_error"),
        (EngineFault("no"), "server_error"),
        (RuntimeError("no"), "server_error"),
    ],
)
@pytest.mark.parametrize("before", [(), (STARTED,), (STARTED, TextDelta("Hel"))])
async def test_a_failure_passes_through_and_is_told_of_once(before: tuple[Event, ...], error: Exception, outcome: Outcome) -> None:
    gate, backend, told = gateway(*before, error)
    with pytest.raises(type(error)) as raised:
        await read_all(gate)
    assert raised.value is error
    (exchange,) = told
    assert (exchange.outcome, exchange.error) == (outcome, type(error).__name__)
    assert exchange.backend == ("scripted" if before else None)
    assert exchange.usage.prompt == (3 if before else 0)
    assert gate.num_in_flight == backend.num_open == 0


@pytest.mark.parametrize("script", [(), (STARTED,), (STARTED, TextDelta("Hel")), HELLO[:-1]])
async def test_silence_is_not_an_end(script: tuple[Event, ...]) -> None:
    gate, _, told = gateway(*script)
    with pytest.raises(EngineFault):
        await read_all(gate)
    assert [e.outcome for e in told] == ["server_error"]


async def test_closing_the_stream_cancels_the_request() -> None:
    gate, backend, told = gateway(STARTED, TextDelta("Hel"), WAIT)
    async with aclosing(gate.stream(REQUEST)) as events:
        assert await anext(events) == STARTED
        assert gate.num_in_flight == backend.num_open == 1
    assert [(e.outcome, e.usage) for e in told] == [("cancelled", Usage(prompt=3))]
    assert gate.num_in_flight == backend.num_open == 0


@pytest.mark.parametrize("script", [(WAIT,), (STARTED, WAIT)])
async def test_cancelling_the_reader_cancels_the_request(script: tuple[Step, ...]) -> None:
    gate, backend, told = gateway(*script)
    reading = asyncio.create_task(read_all(gate))
    await asyncio.sleep(0)
    assert backend.num_open == 1
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert [(e.outcome, e.error) for e in told] == [("cancelled", None)]
    assert gate.num_in_flight == backend.num_open == 0


async def test_a_reader_that_leaves_after_the_last_event_has_had_it_all() -> None:
    gate, _, told = gateway(*HELLO)
    async with aclosing(gate.stream(REQUEST)) as events:
        async for event in events:
            if isinstance(event, Finished):
                break
    assert [e.outcome for e in told] == ["ok"]


async def test_more_than_there_is_room_for_are_refused_and_told_of() -> None:
    gate, backend, told = gateway(STARTED, WAIT, max_requests=2)
    async with aclosing(gate.stream(REQUEST)) as one, aclosing(gate.stream(REQUEST)) as two:
        await anext(one)
        await anext(two)
        with pytest.raises(Overloaded) as refused:
            await read_all(gate)
        assert refused.value.retry_after_s >= 1
        assert (len(backend.requests), gate.num_in_flight) == (2, 2)
        assert [(e.outcome, e.backend, e.error) for e in told] == [("server_error", None, "Overloaded")]
    assert gate.num_in_flight == 0
    backend.script = HELLO
    assert (await collect(gate.stream(REQUEST))).choices[0].text == "Hello"


async def test_a_draining_gateway_admits_nobody_and_waits_for_the_last_reply() -> None:
    gate, _, told = gateway(STARTED, WAIT)
    events = gate.stream(REQUEST)
    await anext(events)
    draining = asyncio.create_task(gate.drain())
    await asyncio.sleep(0)
    assert gate.is_draining
    with pytest.raises(Overloaded, match="shutting down"):
        await read_all(gate)
    assert not draining.done()
    await events.aclose()
    await draining
    assert [e.outcome for e in told] == ["server_error", "cancelled"]


async def test_an_idle_gateway_has_nothing_to_drain() -> None:
    gate, _, _ = gateway()
    await gate.drain()
    assert gate.is_draining


@pytest.mark.parametrize(("request_", "operation"), [(EMBEDDING, "embeddings"), (RERANK, "rerank")])
async def test_vectors_and_rankings_go_through_the_same_door(request_: EmbeddingRequest | RerankRequest, operation: str) -> None:
    gate, backend, told = gateway()
    await measure(gate, request_)
    backend.script = (InvalidField("no", param="input"),)
    with pytest.raises(InvalidField):
        await measure(gate, request_)
    backend.script = (RuntimeError("no"),)
    with pytest.raises(RuntimeError):
        await measure(gate, request_)
    assert [(e.operation, e.outcome, e.backend, e.error, e.usage.prompt) for e in told] == [
        (operation, "ok", "scripted", None, 7),
        (operation, "client_error", None, "InvalidField", 0),
        (operation, "server_error", None, "RuntimeError", 0),
    ]
    assert gate.num_in_flight == backend.num_open == 0


async def test_vectors_have_a_place_and_are_waited_for_and_can_be_cancelled() -> None:
    gate, backend, told = gateway(WAIT, max_requests=1)
    running = asyncio.create_task(measure(gate, EMBEDDING))
    await asyncio.sleep(0)
    assert gate.num_in_flight == backend.num_open == 1
    with pytest.raises(Overloaded):
        await measure(gate, RERANK)
    draining = asyncio.create_task(gate.drain())
    await asyncio.sleep(0)
    assert not draining.done()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await draining
    assert [(e.operation, e.outcome) for e in told] == [("rerank", "server_error"), ("embeddings", "cancelled")]
