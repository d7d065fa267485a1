import pytest

from mlx_manager.bench.prompts import WORDS, WordScale, texts


def test_the_same_salt_gives_the_same_prompts_and_another_gives_others() -> None:
    assert texts("unique", 20, 5, "a") == texts("unique", 20, 5, "a")
    assert not set(texts("unique", 20, 5, "a")) & set(texts("unique", 20, 5, "b"))


def test_unique_prompts_differ_from_the_first_word_on() -> None:
    prompts = texts("unique", 20, len(WORDS), "a")
    assert len({prompt.split()[0] for prompt in prompts}) == len(prompts)


def test_shared_prompts_have_nine_tenths_in_common_and_then_differ() -> None:
    prompts = [prompt.split() for prompt in texts("shared", 100, 30, "a")]
    assert len({tuple(words[:90]) for words in prompts}) == 1
    assert len({words[90] for words in prompts}) == 30


@pytest.mark.parametrize("num_words", [1, 2, 64])
@pytest.mark.parametrize("prefix", ["unique", "shared"])
def test_a_prompt_has_the_words_that_were_asked_for(prefix: str, num_words: int) -> None:
    assert [len(text.split("\n\n")[0].split()) for text in texts(prefix, num_words, 3, "a")] == [num_words] * 3


def test_a_scale_turns_tokens_into_words_by_what_two_prompts_had() -> None:
    scale = WordScale.through((10, 45), (110, 295))  # 20 tokens of template, 2.5 a word
    assert scale.num_words(270) == 100
    assert scale.num_words(5) == 1


@pytest.mark.parametrize("many", [(110, 45), (110, 3), (10, 50)])
def test_counts_that_do_not_grow_with_the_words_are_not_believed(many: tuple[int, int]) -> None:
    assert WordScale.through((10, 45), many) == WordScale()
