"""Each processor against a reference in NumPy, alone and among neighbours that ask for something else."""

import random
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.sampling import Sampler, key
from mlx_manager.inference.engine.sequence import Sequence, SequenceSpec, TokenSampling
from tests.inference.fixture_models import FAMILIES, GREEDY, attached, dialect, make_engine, receive, weights, within

VOCABULARY = 50
Array = np.ndarray

SETTINGS = {
    "plain": TokenSampling(seed=1),
    "cold": TokenSampling(seed=2, temperature=0.4),
    "hot": TokenSampling(seed=3, temperature=1.7),
    "top-k": TokenSampling(seed=4, top_k=5),
    "top-k of one": TokenSampling(seed=4, top_k=1),
    "top-k of more than there are": TokenSampling(seed=4, top_k=1000),
    "top-p": TokenSampling(seed=5, top_p=0.6),
    "hardly any top-p": TokenSampling(seed=5, top_p=0.0),
    "min-p": TokenSampling(seed=6, min_p=0.1),
    "all filters": TokenSampling(seed=7, temperature=1.3, top_k=12, top_p=0.8, min_p=0.02),
    "logit bias": TokenSampling(seed=8, logit_bias={3: 4.0, 7: -100.0}),
    "repetition": TokenSampling(seed=9, repetition_penalty=1.8),
    "presence and frequency": TokenSampling(seed=10, presence_penalty=1.5, frequency_penalty=0.7),
    "all at once": TokenSampling(
        seed=11,
        temperature=0.8,
        top_k=20,
        top_p=0.9,
        repetition_penalty=1.3,
        presence_penalty=-0.5,
        frequency_penalty=0.4,
        logit_bias={5: 2.0},
    ),
}
PROMPT = (4, 4, 9, 17)


def sequence(sampling: TokenSampling, *, num_top: int | None = None) -> Sequence:
    return Sequence(SequenceSpec(PROMPT, 1000, sampling, num_top_logprobs=num_top), 0)


def logits_of(seed: int) -> Array:
    return (np.random.default_rng(seed).normal(size=VOCABULARY) * 2).astype(np.float32)


def adjusted(logits: Array, sampling: TokenSampling, generated: list[int]) -> Array:
    """Bias and penalties, one token at a time."""
    logits = logits.astype(np.float64)
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    for token in {*PROMPT, *generated}:
        logits[token] *= 1 / sampling.repetition_penalty if logits[token] > 0 else sampling.repetition_penalty
    for token, count in Counter(generated).items():
        logits[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    return logits


def distribution(logits: Array, sampling: TokenSampling, generated: list[int]) -> Array:
    """The probabilities by which a token is drawn, in float64 and by sorting."""
    scaled = adjusted(logits, sampling, generated) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities[probabilities < sampling.min_p] = 0
    order = np.argsort(-probabilities)
    if sampling.top_k:
        probabilities[order[sampling.top_k :]] = 0
    before = np.cumsum(probabilities[order]) - probabilities[order]
    surplus = before >= sampling.top_p * probabilities.sum()
    surplus[0] = False
    probabilities[order[surplus]] = 0
    return probabilities / probabilities.sum()


def draw(sampler: Sampler, rows: list[Sequence], logits: Array) -> list[int]:
    """One step, in which every row sees the same logits."""
    tokens = sampler.sample(mx.broadcast_to(mx.array(logits), (len(rows), len(logits)))).tokens
    for row in rows:
        row.num_sampled += 1
    result = tokens.tolist()
    assert isinstance(result, list)
    return result


def drawn(samplings: list[TokenSampling], steps: list[Array]) -> list[list[int]]:
    """The tokens of each row, if they are a batch."""
    sampler, rows = Sampler(VOCABULARY), [sequence(s) for s in samplings]
    sampler.set_rows(rows)
    tokens = [draw(sampler, rows, logits) for logits in steps]
    return [list(of_row) for of_row in zip(*tokens, strict=True)]


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_drawn_by_the_distribution_of_the_reference(name: str) -> None:
    """6,000 seeds after two forced tokens: what cannot be drawn never is, what can be is, as often as it should."""
    forced = [np.where(np.arange(VOCABULARY) == token, 1e6, 0).astype(np.float32) for token in (17, 30)]
    logits, num_draws = logits_of(5), 6_000
    samplings = [replace(SETTINGS[name], seed=seed) for seed in range(num_draws)]
    tokens = drawn(samplings, [*forced, logits])
    assert tokens[0][:2] == [17, 30]
    expected = num_draws * distribution(logits, SETTINGS[name], [17, 30])
    counts = np.bincount([of_row[2] for of_row in tokens], minlength=VOCABULARY)
    assert counts[expected == 0].sum() == 0
    assert (counts[expected > 20] > 0).all()
    often = expected > 5
    chi_square = ((counts - expected)[often] ** 2 / expected[often]).sum()
    degrees = max(1, int(often.sum()) - 1)
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees) + 4


@pytest.mark.parametrize("name", SETTINGS)
def test_neighbours_that_ask_for_something_else_change_no_draw(name: str) -> None:
    random_of = random.Random(name)
    steps = [logits_of(seed) for seed in range(20)]
    (alone,) = drawn([SETTINGS[name]], steps)
    for _ in range(2):
        neighbours = [*random_of.sample(list(SETTINGS.values()), 6), GREEDY]
        place = random_of.randrange(8)
        batch = [*neighbours[:place], SETTINGS[name], *neighbours[place:]]
        assert drawn(batch, steps)[place] == alone


@pytest.mark.requirement("API-01")
def test_greedy_rows_take_the_likeliest_token_whatever_their_neighbours_draw() -> None:
    steps = [logits_of(seed) for seed in range(30)]
    tokens = drawn([GREEDY, *SETTINGS.values(), GREEDY], steps)
    assert tokens[0] == tokens[-1] == [int(logits.argmax()) for logits in steps]


@pytest.mark.parametrize(
    "sampling",
    [
        TokenSampling(seed=0, temperature=0, repetition_penalty=1.5),
        TokenSampling(seed=0, temperature=0, presence_penalty=1.0),
        TokenSampling(seed=0, temperature=0, frequency_penalty=0.6),
        TokenSampling(seed=0, temperature=0, frequency_penalty=-0.3, repetition_penalty=0.8),
        TokenSampling(seed=0, temperature=0, logit_bias={2: 3.0, 30: -100.0}),
    ],
    ids=["repetition", "presence", "frequency", "encouraged", "bias"],
)
@pytest.mark.parametrize("batch", [1, 8])
def test_greedy_with_penalties_equals_the_reference_step_by_step(sampling: TokenSampling, batch: int) -> None:
    logits = logits_of(3)
    settings = [*SETTINGS.values()][: batch - 1]
    tokens = drawn([*settings, sampling], [logits] * 60)[-1]
    reference: list[int] = []
    for _ in range(60):
        reference.append(int(adjusted(logits, sampling, reference).argmax()))
    assert tokens == reference


def test_penalties_count_tokens_that_nobody_has_read_when_the_batch_changes() -> None:
    """A row's last token is on the device only when another leaves or joins: `generated` does not hold it yet."""
    sampling = TokenSampling(seed=0, temperature=0, frequency_penalty=0.6)
    sampler, row, leaver = Sampler(VOCABULARY), sequence(sampling), sequence(SETTINGS["all at once"])
    logits, reference = logits_of(3), list[int]()
    sampler.set_rows([leaver, row])
    rows, place, tokens = [leaver, row], 1, list[int]()
    for step in range(40):
        tokens.append(draw(sampler, rows, logits)[place])
        reference.append(int(adjusted(logits, sampling, reference).argmax()))
        if step == 10:
            rows, place = [row], 0
            sampler.set_rows(rows)
        if step % 5 == 1 and step > 10:
            joining = sequence(SETTINGS["hot" if step % 2 else "repetition"])
            rows = [*rows, joining]
            sampler.set_rows(rows)
    assert tokens == reference


def test_a_row_without_penalties_stays_when_one_with_penalties_comes_and_goes() -> None:
    sampler, plain, other = Sampler(VOCABULARY), sequence(GREEDY), sequence(SETTINGS["repetition"])
    logits = logits_of(3)
    sampler.set_rows([plain])
    tokens = draw(sampler, [plain], logits)
    sampler.set_rows([plain, other])
    tokens.append(draw(sampler, [plain, other], logits)[0])
    sampler.set_rows([plain])
    tokens += draw(sampler, [plain], logits)
    assert tokens == [int(logits.argmax())] * 3


def test_hardly_any_temperature_is_greedy_and_no_error() -> None:
    steps = [logits_of(seed) for seed in range(10)]
    (tokens,) = drawn([TokenSampling(seed=1, temperature=1e-45)], steps)
    assert tokens == [int(logits.argmax()) for logits in steps]


def test_keys_are_well_spread() -> None:
    for keys in (
        np.array([key(7, position) for position in range(20_000)]),
        np.array([key(seed, 0) for seed in range(20_000)]),
        np.array([key(seed, seed) for seed in range(-10_000, 10_000)]),
        np.array([key(2**63 + seed * 2**32, 5) for seed in range(20_000)]),
    ):
        assert len(np.unique(keys, axis=0)) == 20_000
        for numbers in keys.T / 2**32:
            counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
            assert ((counts - 200) ** 2 / 200).sum() < 99 + 4 * np.sqrt(2 * 99)
            assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


def test_sums_that_round_differently_hardly_ever_change_a_draw() -> None:
    """In another batch logits differ in their last bits. Of 4,000 draws among a thousand tokens none may notice."""
    random_of = np.random.default_rng(0)
    rows = [sequence(TokenSampling(seed=seed)) for seed in range(4_000)]
    logits = random_of.normal(size=(len(rows), 1_000)).astype(np.float32)
    found: list[Array] = []
    for noise in (0.0, 1e-6):
        sampler = Sampler(1_000)
        sampler.set_rows(rows)
        noisy = logits * (1 + noise * random_of.normal(size=logits.shape))
        found.append(np.array(sampler.sample(mx.array(noisy.astype(np.float32))).tokens))
    assert (found[0] != found[1]).sum() == 0
    assert len(np.unique(found[0])) > 500


# ---- through the engine


def asking(sampling: TokenSampling, *, prompt: tuple[int, ...] = (310, 320, 330), num_top: int | None = None) -> SequenceSpec:
    return SequenceSpec(prompt, 12, sampling, num_top_logprobs=num_top)


async def generated(device: Device, family: str, specs: list[SequenceSpec]) -> list[list[int]]:
    engine = make_engine(device, family)
    async with attached(device, engine):
        return [r.tokens for r in await within(receive(engine, specs))]


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_same_seed_gives_the_same_tokens_alone_and_among_seven_others(device: Device, family: str) -> None:
    wanted = asking(TokenSampling(seed=99, temperature=2.0, top_p=0.98))
    ((*alone,),) = await generated(device, family, [wanted])
    settings = list(SETTINGS.values())
    for first in (0, 4):
        others = [asking(s, prompt=tuple(range(300, 305 + 9 * i))) for i, s in enumerate(settings[first : first + 7])]
        batch = await generated(device, family, [*others[:3], wanted, *others[3:]])
        assert batch[3] == alone
    others = [asking(replace(wanted.sampling, seed=seed)) for seed in range(100, 106)]
    assert any(tokens != alone for tokens in await generated(device, family, others))


@pytest.mark.parametrize("family", FAMILIES)
async def test_log_probabilities_are_the_log_softmax_of_an_independent_pass(device: Device, family: str) -> None:
    """Of the model's own distribution: temperature and filters of the request leave them alone."""
    specs = [
        asking(GREEDY, num_top=4),
        asking(TokenSampling(seed=5, temperature=1.5, top_k=30), num_top=0, prompt=(310, 300, 301, 302)),
        asking(GREEDY, prompt=(333,)),
        asking(TokenSampling(seed=6, repetition_penalty=1.4), num_top=20, prompt=(340, 341)),
    ]
    engine = make_engine(device, family)
    async with attached(device, engine):
        results = await within(receive(engine, specs))
    for spec, result in zip(specs, results, strict=True):
        tokens = [*spec.prompt, *result.tokens]
        reference = await device.run(lambda tokens=tokens: _log_softmax(family, tokens))
        for at, item in enumerate(result.items):
            if spec.num_top_logprobs is None:
                assert (item.logprob, item.top) == (None, ())
                continue
            row = reference[len(spec.prompt) - 1 + at]
            assert item.logprob == pytest.approx(row[item.token], abs=2e-4)
            assert len(item.top) == spec.num_top_logprobs
            assert [p for _, p in item.top] == sorted((p for _, p in item.top), reverse=True)
            assert [p for _, p in item.top] == pytest.approx(np.sort(row)[::-1][: len(item.top)].tolist(), abs=2e-4)
            assert [row[t] for t, _ in item.top] == pytest.approx([p for _, p in item.top], abs=2e-4)


def _log_softmax(family: str, tokens: list[int]) -> Array:
    logits = weights(family)(mx.array([tokens]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


async def test_more_alternatives_than_the_vocabulary_has_are_all_of_it(device: Device) -> None:
    size = dialect("qwen3").vocab_size
    engine = make_engine(device, "qwen3")
    async with attached(device, engine):
        (result,) = await within(receive(engine, [asking(GREEDY, num_top=size + 10)]))
    assert {len(item.top) for item in result.items} == {size}
