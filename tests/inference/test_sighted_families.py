"""Families that see, as their own models of mlx-vlm do in one pass over a whole prompt: in any chunk, batch and after any hit."""

import io
from collections.abc import Sequence as Items
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image as Pillow

from mlx_manager.core.messages import Image, Message, content_of
from mlx_manager.core.requests import Conversation, GenerationRequest, Sampling
from mlx_manager.hub.checkpoint import read
from mlx_manager.inference.engine.block_pool import BlockPool
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.engine import Engine
from mlx_manager.inference.engine.pace import Pace
from mlx_manager.inference.engine.paged_attention import Reference
from mlx_manager.inference.engine.paged_cache import PagedCache
from mlx_manager.inference.engine.picture_model import PictureModel
from mlx_manager.inference.engine.prefix import PrefixKeys
from mlx_manager.inference.engine.runner import Runner
from mlx_manager.inference.engine.scheduler import Policy, Scheduler
from mlx_manager.inference.engine.sequence import Sequence, SequenceSpec
from mlx_manager.inference.loader import EngineLimits, Progress, SharedWeights, Turns, load_dialect, load_engine
from mlx_manager.inference.loader import make_engine as build_engine
from mlx_manager.inference.picture import Picture, PlacedPicture
from mlx_manager.inference.picture_reader import PictureReader
from tests.inference.fixture_models import GREEDY, attached, folder, receive, within
from tests.inference.tiny_sighted import FAMILIES, IMAGE, VOCABULARY, Processor, joined, tiny, tiny_paligemma, write_gemma3, write_qwen

Part = Items[int] | Picture
NUM_TOKENS = 12


@cache
def reader(family: str) -> PictureReader:
    return PictureReader(Processor(family), vocab_size=VOCABULARY)


def picture_of(seed: int, width: int = 32, height: int = 16) -> Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Pillow.fromarray(noise).save(buffer, "PNG")
    return Image(buffer.getvalue())


def picture(family: str, seed: int, width: int = 32, height: int = 16) -> Picture:
    return reader(family).read(picture_of(seed, width, height), "<image>")


def words(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(1, 280, count)]


def spec(*parts: Part) -> SequenceSpec:
    prompt: list[int] = []
    pictures: list[PlacedPicture] = []
    for part in parts:
        if isinstance(part, Picture):
            pictures.append(PlacedPicture(len(prompt), part))
            prompt += part.names
        else:
            prompt += part
    return SequenceSpec(tuple(prompt), NUM_TOKENS, GREEDY, pictures=tuple(pictures))


@cache
def reference_tokens(family: str) -> list[list[int]]:
    return [reference(family, *case)[1] for case in cases(family)]


def reference(family: str, *parts: Part) -> tuple[mx.array, list[int]]:
    """Of mlx-vlm's own model, its processor's arrays and its cache: the logits [L, V] of a whole prompt, and what it says greedily."""
    from mlx_vlm.models.cache import make_prompt_cache  # noqa: PLC0415

    if family == "gemma3":
        return gemma3_reference(*parts)
    model = tiny(family)
    language = model.language_model
    spelt = [t for part in parts for t in (part.tokens if isinstance(part, Picture) else part)]
    pictures = [part.arrays for part in parts if isinstance(part, Picture)]
    arrays = joined(family, pictures) if pictures else {}
    kept = make_prompt_cache(language)
    if hasattr(language, "_rope_deltas"):
        language._rope_deltas = language._position_ids = None
    logits = model(mx.array([spelt]), arrays.pop("pixel_values", None), mask=None, cache=kept, **arrays).logits
    prompt = logits[0]
    tokens: list[int] = []
    for _ in range(NUM_TOKENS):
        tokens.append(int(np.argmax(np.array(logits[0, -1]))))
        logits = language(mx.array([[tokens[-1]]]), cache=kept).logits
    return prompt, tokens


def gemma3_reference(*parts: Part) -> tuple[mx.array, list[int]]:
    """Gemma 3 has to be told whom each token sees, layer by layer: mlx-vlm's own pass lets every token see every other, and its generation
    none but those before it. All is computed anew for each token that is said."""
    model = tiny("gemma3")
    language = model.language_model
    spelt = [t for part in parts for t in (part.tokens if isinstance(part, Picture) else part)]
    owners = [n if t == IMAGE else -1 - n for n, part in enumerate(parts) for t in (part.tokens if isinstance(part, Picture) else part)]
    arrays = joined("gemma3", [part.arrays for part in parts if isinstance(part, Picture)] or [{}])
    prompt: mx.array | None = None
    tokens: list[int] = []
    while prompt is None or len(tokens) < NUM_TOKENS:
        ids, who = [*spelt, *tokens], [*owners, *[-1] * len(tokens)]
        one_picture = np.equal.outer(who, who) & (np.array(who) >= 0)
        back = np.subtract.outer(np.arange(len(ids)), np.arange(len(ids)))
        given = model.get_input_embeddings(mx.array([ids]), mask=mx.ones((1, len(ids))), **arrays).inputs_embeds
        hidden = given * mx.array(128**0.5, mx.bfloat16).astype(mx.float32)
        for number, layer in enumerate(language.model.layers):
            sees = (back >= 0) & ((number % 2 == 1) | (back < 32)) | one_picture
            hidden = layer(hidden, mx.array(sees), None)
        logits = language.lm_head(language.model.norm(hidden))[0]
        prompt = logits if prompt is None else prompt
        tokens.append(int(np.argmax(np.array(logits[-1]))))
    return prompt, tokens


def make_engine(device: Device, family: str, **limits: Any) -> Engine:
    asked = EngineLimits(**{"check_every": 1, "step_s": 10.0, "kv_bytes": 64 << 20, "ahead": True} | limits)
    return build_engine(PictureModel(tiny(family)), device, asked, vocab_size=VOCABULARY, model_key=family)


def cases(family: str) -> list[tuple[Part, ...]]:
    return [
        (words(0, 5), picture(family, 0), words(1, 4)),
        (words(2, 40), picture(family, 1, 40, 24), words(3, 3)),
        (words(4, 3), picture(family, 2), words(5, 6), picture(family, 3, 16, 32), words(6, 2)),
        (words(7, 2), picture(family, 4), picture(family, 4), words(8, 1)),
        (words(9, 50),),
        (words(10, 3),),
    ]


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_self_test_at_load_lets_it_see(device: Device, family: str) -> None:
    (shown, *_) = cases(family)
    assert await device.run(lambda: PictureModel(tiny(family)).self_test(spec(*shown))) is None


async def test_the_self_test_at_load_refuses_a_family_that_sees_its_whole_prompt_both_ways(device: Device) -> None:
    (shown, *_) = cases("llava")
    problem = await device.run(lambda: PictureModel(tiny_paligemma()).self_test(spec(*shown)))
    assert problem == "UnsupportedPictures: it needs attention_mask_4d beside embeddings"


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_logits_of_every_token_are_those_of_one_pass_wherever_the_prompt_is_cut(device: Device, family: str) -> None:
    parts = cases(family)[2]

    def worst() -> float:
        expected, _ = reference(family, *parts)
        model = PictureModel(tiny(family))
        sequence = Sequence(spec(*parts), 0)
        model.place(sequence)
        stop = len(sequence.tokens)
        differences: list[np.ndarray] = []
        whole = [(p.start, p.stop) for p in sequence.spec.pictures if model.looks_both_ways]
        for cut in range(1, stop):
            if any(first < cut < last for first, last in whole):
                continue
            kept = model.make_cache()
            chunks = [model(model.shown(sequence, *chunk), cache=kept)[0] for chunk in ((0, cut), (cut, stop))]
            differences.append(np.abs(np.array(mx.concatenate(chunks)) - np.array(expected)))
        return float(np.max(differences) / np.abs(np.array(expected)).max())

    assert await device.run(worst) < 1e-4


@pytest.mark.requirement("SRV-04")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [2048, 7])
async def test_a_batch_of_pictures_and_text_says_what_the_model_says_alone(device: Device, family: str, budget: int) -> None:
    expected = await device.run(lambda: reference_tokens(family))
    async with attached(device, make_engine(device, family, prefill_budget=budget)) as engine:
        received = await within(receive(engine, [spec(*case) for case in cases(family)]), 60)
        assert engine.cache_state.kind == FAMILIES[family].cache
    assert [r.tokens for r in received] == expected


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.cache == "slots"])
async def test_blocks_that_a_kernel_reads_hold_pictures_as_rows_do(device: Device, family: str) -> None:
    expected = await device.run(lambda: reference_tokens(family))
    model = PictureModel(tiny(family))
    runner = Runner(PagedCache(model, Reference(), 64), VOCABULARY, model)
    scheduler = Scheduler(BlockPool(64), PrefixKeys(family, "pages"), Policy(whole_pictures=model.looks_both_ways))
    async with attached(device, Engine(device, runner, scheduler, Pace(7, 10.0), check_every=1)) as engine:
        received = await within(receive(engine, [spec(*case) for case in cases(family)]), 60)
    assert [r.tokens for r in received] == expected


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_second_turn_finds_the_first_and_shows_another_picture(device: Device, family: str) -> None:
    first = (words(20, 28), picture(family, 5, 40, 24), words(24, 20))  # a block ends inside the picture
    _, said = await device.run(lambda: reference(family, *first))
    assert IMAGE not in said
    second = (*first, said, words(22, 2), picture(family, 6), words(23, 3))
    other = (words(20, 28), picture(family, 7, 40, 24), words(24, 20))
    expected = await device.run(lambda: [reference(family, *turn)[1] for turn in (second, other)])
    async with attached(device, make_engine(device, family)) as engine:
        (began,) = await within(receive(engine, [spec(*first)]))
        before = engine.counters.cached_tokens
        (went_on,) = await within(receive(engine, [spec(*second)]))
        assert engine.counters.cached_tokens >= before + 32
        found = engine.counters.cached_tokens
        (another,) = await within(receive(engine, [spec(*other)]))
        before_picture = 0 if family == "qwen3_5" else 28  # whose layers keep states, which stand for whole blocks
        assert engine.counters.cached_tokens - found == before_picture
    assert began.tokens == said
    assert [went_on.tokens, another.tokens] == expected
    assert another.tokens != said


def loaded(turns: Turns[tuple[Engine, int]]) -> Engine:
    """All turns of a load at once."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value[0]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "gemma3"])
async def test_a_checkpoint_is_loaded_with_its_eyes(device: Device, family: str, tmp_path: Path) -> None:
    if family == "gemma3":
        await device.run(lambda: write_gemma3(tmp_path, folder("gemma3_text")))
    else:
        await device.run(lambda: write_qwen(tmp_path, family, folder("qwen2_vl")))
    checkpoint = read(tmp_path, family)
    assert checkpoint.kind == "vision"
    spoken = load_dialect(tmp_path, checkpoint.context_length, sees=True)
    content = content_of([picture_of(3), "Which of them?", picture_of(4)])
    asked = GenerationRequest("m", (Conversation((Message("user", content),)),), sampling=Sampling(temperature=0.0), max_tokens=8)
    (made,) = spoken.prepare(asked).specs
    assert len(made.pictures) == 2
    limits = EngineLimits(step_s=10.0, kv_bytes=64 << 20)
    engine = await device.run(lambda: loaded(load_engine(checkpoint, spoken, device, limits, SharedWeights(), Progress())))
    try:
        assert engine.takes_pictures
        (received,) = await within(receive(engine, [made]))
        assert received.ended is not None
        assert received.tokens
    finally:
        await device.run(lambda: device.detach(engine))
