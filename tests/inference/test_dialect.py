"""What a request becomes before the engine sees it: defaults, limits, numbering."""

from dataclasses import fields, replace
from typing import Any

import pytest

from mlx_manager.core.errors import ContextTooLong, InvalidField
from mlx_manager.core.messages import Message
from mlx_manager.core.requests import Conversation, GenerationRequest, RawPrompt, Sampling
from mlx_manager.inference.dialect import Dialect, Prepared
from mlx_manager.inference.engine.sequence import TokenSampling
from tests.inference.fixture_models import dialect

CHAT = Conversation((Message("user", "Hi"),))


def dialect_with(**changes: Any) -> Dialect:
    return replace(dialect("qwen3"), **changes)


def prepare(*prompts: Any, its: Dialect | None = None, **request: Any) -> Prepared:
    return (its or dialect("qwen3")).prepare(GenerationRequest("m", prompts or (CHAT,), **request))


def resolved(asked: Sampling, defaults: dict[str, Any]) -> TokenSampling:
    return prepare(its=dialect_with(defaults=defaults), sampling=asked).specs[0].sampling


VALUES: dict[str, tuple[Any, Any, Any]] = {
    # what no value means by itself, a falsy answer, the makers' recommendation
    "temperature": (1.0, 0.0, 0.6),
    "top_p": (1.0, 0.0, 0.95),
    "top_k": (0, 0, 20),
    "min_p": (0.0, 0.0, 0.05),
    "repetition_penalty": (1.0, 1.0, 1.05),
    "presence_penalty": (0.0, 0.0, 0.5),
    "frequency_penalty": (0.0, 0.0, 0.5),
}


def test_every_field_of_sampling_is_looked_at_here() -> None:
    assert {f.name for f in fields(Sampling)} == {*VALUES, "seed", "logit_bias"}


@pytest.mark.requirement("API-01")
@pytest.mark.parametrize("name", VALUES)
def test_what_the_client_said_comes_first_then_the_makers_then_no_effect(name: str) -> None:
    neutral, falsy, recommended = VALUES[name]
    assert getattr(resolved(Sampling(), {}), name) == neutral
    assert getattr(resolved(Sampling(), {name: recommended}), name) == recommended
    assert getattr(resolved(Sampling(), {name: None}), name) == neutral
    assert getattr(resolved(Sampling(**{name: falsy}), {name: recommended}), name) == falsy


def test_models_that_do_not_sample_are_greedy_unless_asked() -> None:
    defaults = {"do_sample": False, "temperature": 0.6}
    assert resolved(Sampling(), defaults).temperature == 0
    assert resolved(Sampling(top_p=0.9), defaults).temperature == 0
    assert resolved(Sampling(temperature=0.3), defaults).temperature == 0.3
    assert resolved(Sampling(), {"do_sample": True, "temperature": 0.6}).temperature == 0.6
    assert resolved(Sampling(), {"temperature": 0}).temperature == 0


def test_seeds_differ_by_reply_and_are_the_clients_or_new() -> None:
    specs = prepare(num_replies=3, sampling=Sampling(seed=0)).specs
    assert len({s.sampling.seed for s in specs}) == 3
    assert specs == prepare(num_replies=3, sampling=Sampling(seed=0)).specs
    assert prepare().specs[0].sampling.seed != prepare().specs[0].sampling.seed


def test_choices_are_numbered_prompt_by_prompt() -> None:
    prepared = prepare(RawPrompt((5, 6, 7)), RawPrompt((8,)), num_replies=2)
    assert [s.prompt for s in prepared.specs] == [(5, 6, 7), (5, 6, 7), (8,), (8,)]
    assert prepared.prompt_tokens == 4
    assert len(prepared.room) == len(prepared.rendered) == 4


@pytest.mark.parametrize("bias", [-1, 10**6])
def test_a_bias_on_a_token_that_the_model_has_not_is_refused(bias: int) -> None:
    with pytest.raises(InvalidField, match="vocabulary") as refused:
        prepare(sampling=Sampling(logit_bias={bias: 1.0}))
    assert refused.value.param == "logit_bias"


@pytest.mark.parametrize("tokens", [(-1,), (5, 10**6), ()])
def test_token_ids_that_the_model_has_not_and_empty_prompts_are_refused(tokens: tuple[int, ...]) -> None:
    with pytest.raises(InvalidField) as refused:
        prepare(RawPrompt((5,)), RawPrompt(tokens))
    assert refused.value.param == "prompt"
    size = dialect("qwen3").vocab_size
    assert prepare(RawPrompt((size - 1,))).specs[0].prompt == (size - 1,)


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers() -> None:
    its = dialect_with(context_length=8)
    with pytest.raises(ContextTooLong) as refused:
        prepare(RawPrompt((5,) * 8), its=its)
    assert (refused.value.limit, refused.value.tokens) == (8, 8)
    assert "8 tokens" in refused.value.message
    (spec,) = prepare(RawPrompt((5,) * 7), its=its).specs
    assert spec.max_tokens == 1


@pytest.mark.parametrize(("asked", "given"), [(None, 5), (3, 3), (5, 5), (100, 5)])
def test_a_reply_is_as_long_as_was_asked_and_the_context_allows(asked: int | None, given: int) -> None:
    prepared = prepare(RawPrompt((5,) * 3), its=dialect_with(context_length=8), max_tokens=asked)
    assert prepared.specs[0].max_tokens == given
    assert prepared.room == (5,)


def test_stop_tokens_are_those_of_the_files_and_the_family() -> None:
    its = dialect("llama")
    vocabulary = its.tokenizer.get_vocab()
    assert {vocabulary["<|eot_id|>"], vocabulary["<|eom_id|>"], vocabulary["<|end_of_text|>"]} <= its.stop_tokens
    assert prepare(its=its).specs[0].stop_tokens == its.stop_tokens
