"""Vectors: what they must be, whatever was computed beside them; and turns, which are shared."""

import asyncio
import json
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_manager.core.errors import ContextTooLong, EngineFault, InvalidField, ModelLoadFailed
from mlx_manager.core.requests import EmbeddingRequest, RerankRequest
from mlx_manager.hub.checkpoint import read
from mlx_manager.inference.embedder import MAX_PADDING, Embedder, Job, LocalEmbedder, next_batch
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.pace import Pace
from mlx_manager.inference.loader import EngineLimits
from mlx_manager.inference.pool import Pool
from mlx_manager.inference.text_reader import Row
from tests.inference.fixture_models import eventually, folder, within
from tests.inference.tiny_encoders import (
    CONFIGS,
    BertByHand,
    add_pooling,
    copy_of_tiny_bert,
    make_encoder,
    rename_weights,
    unit,
)

TEXTS = [
    "What is the weather in Paris?",
    "x",
    "Count from 1 to 20. " * 12,
    "weather in Paris",
    "Tell me about the sea. " * 30,
    "café 日本 🚀",
    "Count to 20.",
    "apple " * 60,
]


def wanted(*inputs: str | tuple[int, ...], dimensions: int | None = None) -> EmbeddingRequest:
    return EmbeddingRequest("tiny", inputs, tuple(f"input[{i}]" for i in range(len(inputs))), dimensions)


def pool_with(device: Device, path: Path, **limits: Any) -> Pool:
    checkpoint = read(path, "tiny")
    return Pool(device, lambda: [checkpoint], EngineLimits(**limits))


async def embed(pool: Pool, request: EmbeddingRequest) -> np.ndarray:
    prepared = (await pool.text_reader("tiny")).prepare(request)
    async with pool.lend_embedder("tiny") as model:
        made = await within(model.embed(prepared))
    assert made.prompt_tokens == sum(len(row.tokens) for row in prepared.rows)
    return np.array([np.frombuffer(vector, "<f4") for vector in made.vectors])


@pytest.fixture
def tiny(device: Device) -> Pool:
    return pool_with(device, folder("tiny_bert"))


# ---- what the vectors are


@pytest.mark.requirement("SRV-05", "D-08")
async def test_vectors_are_those_of_a_bert_computed_by_hand(tiny: Pool) -> None:
    reader = await tiny.text_reader("tiny")
    by_hand = BertByHand(folder("tiny_bert"))
    expected = np.array([unit(by_hand.states(tokens).mean(0)) for tokens in reader.encode(TEXTS)])
    vectors = await embed(tiny, wanted(*TEXTS))
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.requirement("SRV-05")
@pytest.mark.parametrize("module", CONFIGS)
async def test_a_batch_equals_its_singles_in_the_order_of_the_client(device: Device, tmp_path: Path, module: str) -> None:
    path = make_encoder(tmp_path / "tiny", module)
    assert read(path, "tiny").kind == "embedding"
    pool = pool_with(device, path)
    texts = TEXTS * 3 + ["a " * n for n in range(1, 40)]
    together = await embed(pool, wanted(*texts))
    for text, vector in zip(texts, together, strict=True):
        (alone,) = await embed(pool, wanted(text))
        np.testing.assert_allclose(vector, alone, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01, "different texts differ"
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("module", CONFIGS)
async def test_half_precision_says_nothing_that_is_no_number(device: Device, tmp_path: Path, module: str, dtype: mx.Dtype) -> None:
    pool = pool_with(device, make_encoder(tmp_path / "tiny", module, dtype=dtype))
    texts = ["x", "a " * 60, "b " * 150, "c " * 200, "y"]
    together = await embed(pool, wanted(*texts))
    for text, vector in zip(texts, together, strict=True):
        (alone,) = await embed(pool, wanted(text))
        assert float(vector @ alone) > 0.99


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_mean_tokens": True}, lambda states: states.mean(0)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda states: states[0]),
        ({"pooling_mode_lasttoken": True}, lambda states: states[-1]),
        ({"pooling_mode": "cls"}, lambda states: states[0]),
        ({"pooling_mode": "lasttoken"}, lambda states: states[-1]),
    ],
    ids=["mean", "first", "last", "first in a word", "last in a word"],
)
async def test_the_checkpoint_says_which_states_make_the_vector(
    device: Device, tmp_path: Path, pooling: dict[str, Any], expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    path = copy_of_tiny_bert(tmp_path / "tiny")
    add_pooling(path, pooling)
    pool = pool_with(device, path)
    tokens = (await pool.text_reader("tiny")).encode(TEXTS)
    by_hand = BertByHand(path)
    np.testing.assert_allclose(await embed(pool, wanted(*TEXTS)), [unit(expected(by_hand.states(t))) for t in tokens], atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "others", "why"),
    [
        ({"pooling_mode_max_tokens": True}, (), "pools"),
        ({"pooling_mode": "weightedmean"}, (), "pools"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, (), "pools"),
        ({"pooling_mode_cls_token": True}, ("Dense",), "Dense"),
        ({"pooling_mode_cls_token": True}, ("LSTM",), "LSTM"),
    ],
)
async def test_a_pipeline_that_cannot_be_followed_is_refused_and_not_guessed(
    device: Device, tmp_path: Path, pooling: dict[str, Any], others: tuple[str, ...], why: str
) -> None:
    path = copy_of_tiny_bert(tmp_path / "tiny")
    add_pooling(path, pooling, others=others)
    with pytest.raises(ModelLoadFailed, match=why):
        await embed(pool_with(device, path), wanted("x"))


async def test_heads_and_prefixes_that_a_checkpoint_brings_or_lacks_make_no_difference(device: Device, tmp_path: Path) -> None:
    path = copy_of_tiny_bert(tmp_path / "tiny")
    plain = await embed(pool_with(device, path), wanted(*TEXTS))
    rename_weights(path, lambda name: None if name.startswith("pooler.") else f"bert.{name}")
    np.testing.assert_array_equal(await embed(pool_with(device, path), wanted(*TEXTS)), plain)
    rename_weights(path, lambda name: None if "layer.1.output.dense.weight" in name else name)
    with pytest.raises(ModelLoadFailed, match="weights"):
        await embed(pool_with(device, path), wanted("x"))


async def test_vectors_are_cut_only_where_the_checkpoint_says_that_they_can_be(device: Device, tmp_path: Path) -> None:
    plain = pool_with(device, copy_of_tiny_bert(tmp_path / "plain"))
    whole = await embed(plain, wanted(*TEXTS))
    np.testing.assert_array_equal(await embed(plain, wanted(*TEXTS, dimensions=64)), whole)
    for dimensions in (1, 32, 65):
        with pytest.raises(InvalidField) as refused:
            await embed(plain, wanted("x", dimensions=dimensions))
        assert (refused.value.param, refused.value.code) == ("dimensions", "unsupported_value")
    named = pool_with(device, copy_of_tiny_bert(tmp_path / "named", matryoshka_dimensions=[16, 32]))
    any_size = pool_with(device, copy_of_tiny_bert(tmp_path / "any", is_matryoshka=True))
    for pool, dimensions in ((named, 16), (named, 32), (any_size, 5)):
        expected = np.array([unit(v[:dimensions]) for v in whole])
        np.testing.assert_allclose(await embed(pool, wanted(*TEXTS, dimensions=dimensions)), expected, atol=1e-6)
    with pytest.raises(InvalidField):
        await embed(named, wanted("x", dimensions=20))
    with pytest.raises(InvalidField):
        await embed(any_size, wanted("x", dimensions=65))


# ---- what is read


async def test_a_text_that_is_too_long_is_refused_by_its_name_and_never_cut(tiny: Pool) -> None:
    longest = "a " * 510
    assert len((await tiny.text_reader("tiny")).encode([longest])[0]) == 512
    await embed(tiny, wanted(longest, (5,) * 512))
    for request in (wanted("x", longest + "a"), wanted("x", (5,) * 513)):
        with pytest.raises(ContextTooLong) as refused:
            await embed(tiny, request)
        assert (refused.value.limit, refused.value.tokens, refused.value.where) == (512, 513, "input[1]")


async def test_positions_that_begin_after_the_padding_are_not_counted_on(device: Device, tmp_path: Path) -> None:
    pool = pool_with(device, make_encoder(tmp_path / "tiny", "xlm_roberta"))
    assert (await pool.text_reader("tiny")).context_length == 256
    await embed(pool, wanted((5,) * 256))
    with pytest.raises(ContextTooLong):
        await embed(pool, wanted((5,) * 257))


async def test_tokens_go_to_the_model_as_they_are_and_must_be_in_its_vocabulary(tiny: Pool) -> None:
    (tokens,) = (await tiny.text_reader("tiny")).encode(["weather in Paris"])
    np.testing.assert_array_equal(await embed(tiny, wanted(tokens)), await embed(tiny, wanted("weather in Paris")))
    with pytest.raises(InvalidField, match="1919") as refused:
        await embed(tiny, wanted((1,), (1920,)))
    assert refused.value.param == "input[1]"


async def test_what_a_tokenizer_was_saved_with_neither_cuts_nor_pads(device: Device, tmp_path: Path) -> None:
    path = copy_of_tiny_bert(tmp_path / "tiny")
    saved = json.loads((path / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    (path / "tokenizer.json").write_text(json.dumps(saved))
    reader = await pool_with(device, path).text_reader("tiny")
    assert [len(tokens) for tokens in reader.encode(["a", "a " * 100])] == [3, 102]


async def test_a_text_never_becomes_a_control_token(tiny: Pool) -> None:
    reader = await tiny.text_reader("tiny")
    (plain,), (spelt,) = reader.encode(["a b"]), reader.encode(["a [SEP] b"])
    assert (spelt.count(plain[-1]), spelt.count(plain[0])) == (1, 1)


# ---- ranking


async def test_an_embedding_model_ranks_by_the_cosine(tiny: Pool) -> None:
    query, *documents = TEXTS
    vectors = await embed(tiny, wanted(*TEXTS))
    reader = await tiny.text_reader("tiny")
    async with tiny.lend_embedder("tiny") as model:
        ranking = await model.rank(reader.prepare_ranking(RerankRequest("tiny", query, tuple(documents))))
    np.testing.assert_allclose(ranking.scores, vectors[1:] @ vectors[0], atol=1e-6)
    assert documents[int(np.argmax(ranking.scores))] == "weather in Paris"


@pytest.mark.parametrize("module", ["bert", "xlm_roberta", "modernbert"])
async def test_a_cross_encoder_reads_query_and_document_together(device: Device, tmp_path: Path, module: str) -> None:
    path = make_encoder(tmp_path / "tiny", module, scores=True)
    assert read(path, "tiny").kind == "reranker"
    pool = pool_with(device, path)
    reader = await pool.text_reader("tiny")
    query, documents = TEXTS[0], tuple(TEXTS[1:4])
    prepared = reader.prepare_ranking(RerankRequest("tiny", query, documents))
    async with pool.lend_embedder("tiny") as model:
        ranking = await within(model.rank(prepared))
        assert all(0 < score < 1 for score in ranking.scores)
        assert len({round(score, 5) for score in ranking.scores}) == 3
        for row, document in enumerate(documents):
            alone = await within(model.rank(reader.prepare_ranking(RerankRequest("tiny", query, (document,)))))
            assert alone.scores[0] == pytest.approx(ranking.scores[row], abs=1e-5)
    if module == "bert":
        by_hand = BertByHand(path)
        assert ranking.scores == pytest.approx([by_hand.score(row.tokens, row.types) for row in prepared.rows], abs=1e-5)
    with pytest.raises(InvalidField, match="/v1/rerank"):
        reader.prepare(wanted("x"))


# ---- turns

Lengths = st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=40), min_size=1, max_size=5)


@settings(deadline=None)
@given(Lengths, st.integers(1, 2000))
def test_batches_take_every_row_once_within_the_budget_and_with_little_padding(lengths: list[list[int]], budget: int) -> None:
    loop = asyncio.new_event_loop()
    jobs = [Job([Row((1,) * n) for n in rows], loop.create_future()) for rows in lengths]
    loop.close()
    taken: list[tuple[int, int]] = []
    left = list(jobs)
    while left:
        leading = left[0]
        batch = next_batch(left, budget)
        assert any(job is leading for job, _ in batch)
        sizes = [job.length(row) for job, row in batch]
        assert len(batch) * max(sizes) <= budget or len(batch) == 1
        assert max(sizes) - min(sizes) <= MAX_PADDING
        taken += [(jobs.index(job), row) for job, row in batch]
        left = [job for job in left if job.order]
    assert sorted(taken) == [(j, i) for j, rows in enumerate(lengths) for i in range(len(rows))]


class Scripted:
    """A forward pass that gives back each row's first token and remembers what it was asked."""

    def __init__(self) -> None:
        self.batches: list[np.ndarray] = []
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.fails_on: int | None = None

    def wait(self) -> None:
        assert self.goes_on.wait(20)

    def __call__(self, tokens: np.ndarray, mask: np.ndarray, types: np.ndarray) -> np.ndarray:
        self.batches.append(tokens)
        if self.fails_on in tokens:
            raise RuntimeError("no device")
        return tokens[:, :1].astype(np.float32)


class Busy:
    """Somebody else who always has work; counts its turns."""

    has_work = True

    def __init__(self) -> None:
        self.num_turns = 0
        self.seen: list[int] = []

    def step(self) -> None:
        self.num_turns += 1

    def flush(self) -> None:
        pass


async def scripted(device: Device, forward: Scripted, max_tokens: int = 64) -> Embedder:
    embedder = Embedder(device, forward, Pace(max_tokens, 10.0))
    await device.run(lambda: device.attach(embedder))
    return embedder


def rows(*firsts: int, length: int = 32) -> list[Row]:
    return [Row((first, *[0] * (length - 1))) for first in firsts]


async def test_everybody_else_has_a_turn_between_two_batches(device: Device) -> None:
    forward, busy = Scripted(), Busy()
    embedder = await scripted(device, forward)
    turns_at: list[int] = []
    inner = forward.wait
    forward.wait = lambda: (turns_at.append(busy.num_turns), inner())[-1]  # type: ignore[method-assign]
    await device.run(lambda: device.attach(busy))
    try:
        vectors = await within(embedder.run(rows(*range(100))))
    finally:
        await device.run(lambda: (device.detach(busy), device.detach(embedder)))
    assert [int(v[0]) for v in vectors] == list(range(100))
    assert len(turns_at) >= 50
    assert all(later > earlier for earlier, later in pairwise(turns_at))


async def test_a_short_request_does_not_wait_for_a_long_one(device: Device) -> None:
    forward = Scripted()
    embedder = await scripted(device, forward)
    forward.goes_on.clear()
    asked = [asyncio.create_task(embedder.run(rows(*range(100, 300)))), asyncio.create_task(embedder.run(rows(7, length=200)))]
    await eventually(lambda: embedder.num_running == 2)
    await asyncio.sleep(0)
    forward.goes_on.set()
    long, short = await within(asyncio.gather(*asked))
    assert [int(v[0]) for v in [*short, *long]] == [7, *range(100, 300)]
    assert any(7 in batch for batch in forward.batches[:3])
    assert len(forward.batches) == 101
    await device.run(lambda: device.detach(embedder))


async def test_requests_that_wait_together_share_their_passes(device: Device) -> None:
    forward = Scripted()
    embedder = await scripted(device, forward, max_tokens=4096)
    forward.goes_on.clear()
    asked = [asyncio.create_task(embedder.run(rows(i, length=4))) for i in range(1, 17)]
    await eventually(lambda: embedder.num_running == 16)
    forward.goes_on.set()
    made = await within(asyncio.gather(*asked))
    assert [int(vector[0]) for (vector,) in made] == list(range(1, 17))
    assert len(forward.batches) <= 3
    await device.run(lambda: device.detach(embedder))


async def test_who_leaves_has_no_more_turns(device: Device) -> None:
    forward = Scripted()
    embedder = await scripted(device, forward)
    forward.goes_on.clear()
    leaving = asyncio.create_task(embedder.run(rows(*range(200))))
    await eventually(lambda: embedder.num_running == 1)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    forward.goes_on.set()
    await within(embedder.run(rows(1)))
    assert len(forward.batches) <= 3
    assert not embedder.has_work
    assert embedder.num_running == 0
    await device.run(lambda: device.detach(embedder))


async def test_a_batch_that_fails_fails_those_in_it_and_nobody_else(device: Device) -> None:
    forward = Scripted()
    forward.fails_on = 13
    embedder = await scripted(device, forward)
    failing, fine = await within(
        asyncio.gather(embedder.run(rows(13)), embedder.run(rows(1, 2, length=200)), return_exceptions=True),
    )
    assert isinstance(failing, EngineFault)
    assert not isinstance(fine, BaseException)
    assert [int(v[0]) for v in fine] == [1, 2]
    forward.fails_on = None
    assert await within(embedder.run(rows(13))) is not None
    await device.run(lambda: device.detach(embedder))


async def test_what_is_no_number_is_a_fault_and_no_vector(device: Device) -> None:
    class Nan(Scripted):
        def __call__(self, tokens: np.ndarray, mask: np.ndarray, types: np.ndarray) -> np.ndarray:
            return np.full((len(tokens), 1), np.nan, np.float32)

    embedder = await scripted(device, Nan())
    with pytest.raises(EngineFault):
        await within(embedder.run(rows(1)))
    await device.run(lambda: device.detach(embedder))


async def test_those_under_way_are_told_when_the_server_ends(device: Device) -> None:
    forward = Scripted()
    embedder = await scripted(device, forward)
    forward.goes_on.clear()
    running = asyncio.create_task(embedder.run(rows(*range(9))))
    await eventually(lambda: embedder.num_running == 1)
    embedder.abort(EngineFault("The server is shutting down."))
    with pytest.raises(EngineFault, match="shutting down"):
        await within(running)
    forward.goes_on.set()
    await device.run(lambda: device.detach(embedder))


# ---- the pool


@pytest.mark.requirement("SRV-02")
async def test_eight_cold_requests_load_an_embedding_model_once(device: Device) -> None:
    pool = pool_with(device, folder("tiny_bert"))

    async def borrow() -> LocalEmbedder:
        async with pool.lend_embedder("tiny") as model:
            return model

    assert pool.statuses()[0].state == "cold"
    borrowed = await within(asyncio.gather(*(borrow() for _ in range(8))))
    assert len({id(model.embedder) for model in borrowed}) == 1
    assert pool.statuses()[0].state == "ready"
    assert pool.engines() == {}


async def test_a_model_of_another_kind_says_where_to_go(pool: Pool) -> None:
    with pytest.raises(InvalidField, match="'tiny_bert' makes embeddings: use /v1/embeddings") as chat:
        await pool.dialect("tiny_bert")
    with pytest.raises(InvalidField, match="'qwen3' writes text and makes no embeddings") as embedding:
        await pool.text_reader("qwen3")
    assert (await pool.dialect("qwen2_vl")).pictures is not None
    assert {(e.value.param, e.value.code) for e in (chat, embedding)} == {("model", "invalid_value")}
    kinds = {status.checkpoint.id: status.checkpoint.kind for status in pool.statuses()}
    assert (kinds["qwen3"], kinds["tiny_bert"], kinds["qwen2_vl"]) == ("text", "embedding", "vision")


async def test_how_a_model_reads_is_known_without_its_weights(device: Device, tmp_path: Path) -> None:
    path = copy_of_tiny_bert(tmp_path / "tiny")
    pool = pool_with(device, path)
    (path / "model.safetensors").unlink()
    first, second = await within(asyncio.gather(pool.text_reader("tiny"), pool.reader("tiny")))
    assert first is second
    assert pool.statuses()[0].state == "cold"
    with pytest.raises(ModelLoadFailed) as failed:
        await embed(pool, wanted("x"))
    assert str(tmp_path) not in str(failed.value), "no path of ours"
    assert pool.statuses()[0].state == "failed"
