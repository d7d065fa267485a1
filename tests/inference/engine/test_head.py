"""The logits of one token are those that it has among all, and what is asked of other models stays theirs."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_manager.inference.engine import head
from tests.inference.fixture_models import weights

TOKENS = mx.array([[3, 14, 15, 92, 65], [35, 89, 79, 32, 38]])


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3_text", "glm4", "mistral"])
def test_only_the_logits_that_are_wanted_are_computed(family: str) -> None:
    model = weights(family)
    every = model(TOKENS, cache=make_prompt_cache(model))
    assert head.install(model)
    assert head.install(model), "again"
    with head.only([4, 1]):
        given = model(TOKENS, cache=make_prompt_cache(model))
    assert given.shape == (2, 1, every.shape[2])
    for row, at in enumerate((4, 1)):
        np.testing.assert_allclose(np.array(given[row, 0]), np.array(every[row, at]), atol=1e-3)


def test_afterwards_all_are_there_again() -> None:
    model = weights("qwen3")
    assert head.install(model)
    with head.only([0, 0]):
        pass
    assert model(TOKENS, cache=make_prompt_cache(model)).shape[1] == 5


class Headless(nn.Module):
    """Its last layer has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Identity()]
        self.tokens = mx.random.normal((100, 8))

    def __call__(self, inputs: mx.array, cache: object = None) -> mx.array:
        return self.tokens[inputs] @ self.tokens.T


def test_a_model_with_another_kind_of_end_is_not_asked() -> None:
    assert not head.install(Headless())


def test_nor_is_what_is_no_module() -> None:
    assert not head.install(object())
