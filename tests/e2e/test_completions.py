"""Raw completions through the official SDK.

Whole replies pass its strict mode. Streams cannot: its type for a chunk is that of a whole reply, which has no place for a
`finish_reason` of null, and null is what the upstream API sends before the end.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from openai.types import Completion
from tokenizers import Tokenizer

from tests.e2e.replies import Json, collected_completion, written
from tests.e2e.serving import FIXTURE_MODELS, MODEL, Running

PROMPTS = ["apple apple", "1 2 3", "Hello"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FIXTURE_MODELS / MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def lenient(server: Running) -> Iterator[OpenAI]:
    with server.openai(_strict_response_validation=False) as client:
        yield client


def whole(client: OpenAI, prompt: Any, **options: Any) -> Completion:
    return client.completions.create(**_request(prompt, options))


def streamed(client: OpenAI, prompt: Any, **options: Any) -> Json:
    request = _request(prompt, options)
    return collected_completion(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))


def _request(prompt: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 6, **options}


@pytest.mark.parametrize(
    "options",
    [{}, {"n": 2, "temperature": 1.5, "seed": 3}, {"echo": True}, {"echo": True, "n": 2}, {"logprobs": 3}, {"logprobs": 0}, {"stop": "e"}],
)
@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS, [5, 6, 7], [[5, 6, 7], [8]]])
def test_a_stream_collects_to_the_whole_reply(client: OpenAI, lenient: OpenAI, prompt: Any, options: dict[str, Any]) -> None:
    if "echo" in options and prompt not in (PROMPTS, PROMPTS[0]):
        prompt = PROMPTS[1:]  # only text can be echoed
    assert streamed(lenient, prompt, **options) == written(whole(client, prompt, **options))


def test_every_prompt_of_a_list_is_answered_in_order(client: OpenAI) -> None:
    together = whole(client, PROMPTS, n=2)
    apart = [whole(client, prompt).choices[0].text for prompt in PROMPTS]
    assert [c.index for c in together.choices] == list(range(6))
    assert [c.text for c in together.choices] == [text for text in apart for _ in range(2)]


def test_text_and_its_tokens_are_the_same_prompt(client: OpenAI, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    assert written(whole(client, ids)) == written(whole(client, PROMPTS))
    assert written(whole(client, ids[0])) == written(whole(client, PROMPTS[0]))
    usage = whole(client, ids).usage
    assert usage is not None
    assert usage.prompt_tokens == sum(map(len, ids))


def test_echo_puts_the_prompt_before_the_reply(client: OpenAI) -> None:
    plain, echoed = whole(client, PROMPTS, n=2), whole(client, PROMPTS, n=2, echo=True)
    assert [c.text for c in echoed.choices] == [PROMPTS[i // 2] + c.text for i, c in enumerate(plain.choices)]
    assert echoed.usage == plain.usage


def test_log_probabilities_belong_to_the_tokens_of_the_text(client: OpenAI) -> None:
    reply = whole(client, PROMPTS[0], logprobs=5)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    text = reply.choices[0].text
    assert "".join(logprobs.tokens) == text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top is not None
        assert top[token] == logprob == max(top.values())


def test_a_bias_of_one_hundred_makes_a_token_the_only_one(client: OpenAI, tokenizer: Tokenizer) -> None:
    (token, *_) = tokenizer.encode("apple").ids
    reply = whole(client, "Hello", logit_bias={str(token): 100}, max_tokens=3)
    assert tokenizer.encode(reply.choices[0].text).ids[:1] == [token]
    assert reply.choices[0].text == tokenizer.decode([token] * 3)
    unbiased = whole(client, reply.choices[0].text).choices[0].text
    (banned, *_) = tokenizer.encode(unbiased).ids
    assert whole(client, reply.choices[0].text, logit_bias={str(banned): -100}).choices[0].text != unbiased


def test_without_a_limit_a_completion_has_sixteen_tokens(client: OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt="apple apple apple", temperature=0)
    assert reply.usage is not None
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 16)


def test_every_word_of_the_reply_is_in_its_envelope(client: OpenAI) -> None:
    reply = whole(client, "Hello")
    assert reply.id.startswith("cmpl-")
    assert (reply.object, reply.model) == ("text_completion", MODEL)
