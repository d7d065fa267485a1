"""Replies with a form, in one batch with free ones, through the real engine, whether it is a step ahead or not."""

import asyncio
import json
from typing import Any

import jsonschema
import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.utils import load_model

from mlx_manager.core.events import Finished, TextDelta
from mlx_manager.core.messages import Message
from mlx_manager.core.requests import Conversation, GenerationRequest, JsonSchema, OneOf, Reasoning, Regex, Sampling
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.engine import Engine
from mlx_manager.inference.engine.sequence import SequenceSpec
from mlx_manager.inference.loader import EngineLimits
from mlx_manager.inference.loader import make_engine as build_engine
from mlx_manager.inference.local_model import LocalModel
from tests.inference.engine.test_equality import prompts
from tests.inference.fixture_models import attached, dialect, eventually, folder, make_engine, receive, single_run, within

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog", None]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 500}, "maxItems": 4},
        "at": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"], "additionalProperties": False},
    },
    "required": ["name", "kind", "sizes", "at"],
    "additionalProperties": False,
}


def request(output: Any, *, temperature: float = 1.0, seed: int = 0, num_replies: int = 1) -> GenerationRequest:
    conversation = Conversation((Message("user", "Hi"),), reasoning=Reasoning(enabled=False))
    return GenerationRequest(
        "m",
        (conversation,),
        sampling=Sampling(temperature=temperature, seed=seed),
        output=output,
        num_replies=num_replies,
        max_tokens=400,
    )


async def answers(engine: Engine, asked: GenerationRequest) -> list[str]:
    model = LocalModel(dialect("qwen3"), engine)
    texts = [""] * asked.num_replies
    async for event in model.generate(dialect("qwen3").prepare(asked)):
        if isinstance(event, TextDelta):
            texts[event.choice] += event.text
    return texts


def randomised(model: Any) -> Any:
    """The same model with weights that say nothing."""
    mx.random.seed(7)
    model.update(tree_map(lambda a: mx.random.normal(a.shape, scale=0.3).astype(a.dtype), model.parameters()))
    mx.eval(model.parameters())
    return model


@pytest.mark.requirement("ADAPT-09")
@pytest.mark.parametrize("ahead", [True, False])
async def test_of_a_model_with_random_weights_at_temperature_1_a_hundred_of_a_hundred_answers_validate(device: Device, ahead: bool) -> None:
    model = await device.run(lambda: randomised(load_model(folder("qwen3"))[0]))
    limits = EngineLimits(ahead=ahead, kv_bytes=64 << 20, check_every=1)
    engine = await device.run(lambda: build_engine(model, device, limits, vocab_size=dialect("qwen3").vocab_size, model_key="random"))
    async with attached(device, engine):
        replies = await within(asyncio.gather(*(answers(engine, request(JsonSchema(SCHEMA), seed=i)) for i in range(100))), 240)
    values = [json.loads(text) for (text,) in replies]
    for value in values:
        jsonschema.validate(value, SCHEMA)
    assert len({json.dumps(v) for v in values}) > 50, "and they differ"


@pytest.mark.parametrize("ahead", [True, False])
async def test_free_neighbours_of_constrained_replies_say_what_they_say_alone(device: Device, ahead: bool) -> None:
    specs: list[SequenceSpec] = prompts("qwen3", 6)
    engine = make_engine(device, "qwen3", ahead=ahead)
    async with attached(device, engine):
        constrained = asyncio.gather(
            *(answers(engine, request(JsonSchema(SCHEMA), seed=i)) for i in range(4)),
            *(answers(engine, request(OneOf(("yes", "no")), seed=i, temperature=0.0)) for i in range(4)),
        )
        free, held = await within(asyncio.gather(receive(engine, specs), constrained), 60)
    for spec, received in zip(specs, free, strict=True):
        assert received.tokens == await single_run(device, "qwen3", spec)
    for (text,) in held[:4]:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert {text for (text,) in held[4:]} <= {"yes", "no"}


async def test_a_step_ahead_or_not_a_seeded_answer_is_the_same(device: Device) -> None:
    texts: list[list[list[str]]] = []
    for ahead in (True, False):
        engine = make_engine(device, "qwen3", ahead=ahead)
        async with attached(device, engine):
            asked = [answers(engine, request(JsonSchema(SCHEMA), seed=i, num_replies=2)) for i in range(5)]
            texts.append(await within(asyncio.gather(*asked), 60))
    assert texts[0] == texts[1]


async def test_an_answer_ends_with_its_form_and_not_with_its_limit(device: Device) -> None:
    engine = make_engine(device, "qwen3")
    async with attached(device, engine):
        (text,) = await within(answers(engine, request(Regex("[a-c]{3}"))), 30)
    assert len(text) == 3


async def test_one_pass_serves_constrained_and_free_rows_together(device: Device) -> None:
    """The forward pass of a constrained row is queued with everybody's; only its choice waits."""
    model = LocalModel(dialect("qwen3"), make_engine(device, "qwen3", ahead=True))

    async def num_tokens(asked: GenerationRequest) -> int:
        (end,) = [e async for e in model.generate(dialect("qwen3").prepare(asked)) if isinstance(e, Finished)]
        return end.usage.completion

    async with attached(device, model.engine):
        both = await within(asyncio.gather(num_tokens(request(JsonSchema(SCHEMA))), num_tokens(request(None, temperature=0.0))), 60)
        await eventually(lambda: not model.engine.num_running)
    assert model.engine.counters.decode_steps <= max(both) + 3
