"""Vectors, rankings and tokens through the real server: the official SDK, LangChain, and a socket."""

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import pytest
from openai import BadRequestError, OpenAI

from mlx_manager.protocols.openai.embeddings import EMBEDDING_FIELDS
from mlx_manager.protocols.openai.rerank import RERANK_FIELDS
from mlx_manager.protocols.openai.tokens import DETOKENIZE_FIELDS, TOKENIZE_FIELDS
from tests.e2e.serving import FIXTURE_MODELS, MODEL, Running
from tests.e2e.test_concurrency import FOR_EVER, reset, send

EMBEDDER = "tiny_bert"
TEXTS = ["What is the weather in Paris?", "Count to 10.", "weather in Paris", "My name is Bob."]
EMBEDDINGS, RERANK, TOKENIZE, DETOKENIZE = "/v1/embeddings", "/v1/rerank", "/v1/tokenize", "/v1/detokenize"
RULES = {EMBEDDINGS: EMBEDDING_FIELDS, RERANK: RERANK_FIELDS, TOKENIZE: TOKENIZE_FIELDS, DETOKENIZE: DETOKENIZE_FIELDS}
BASE: dict[str, dict[str, Any]] = {
    EMBEDDINGS: {"model": EMBEDDER, "input": "weather in Paris"},
    RERANK: {"model": EMBEDDER, "query": "weather in Paris", "documents": TEXTS},
    TOKENIZE: {"model": MODEL, "prompt": "weather in Paris"},
    DETOKENIZE: {"model": MODEL, "tokens": [300, 301]},
}
USER = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx2.Client]:
    with server.http() as http:
        yield http


@pytest.fixture(scope="module")
def relaxed(server: Running) -> Iterator[OpenAI]:
    """The SDK as it comes. It asks for base64 unless told otherwise, and its strict mode has no type for its own default."""
    with server.openai(_strict_response_validation=False) as client:
        yield client


def ask(http: httpx2.Client, path: str, **fields: Any) -> dict[str, Any]:
    response = http.post(path, json={k: v for k, v in {**BASE[path], **fields}.items() if v is not ...})
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def refusal(http: httpx2.Client, path: str, **fields: Any) -> dict[str, Any]:
    response = http.post(path, json={**BASE.get(path, {}), **fields})
    assert response.status_code == 400, response.text
    assert response.headers["x-should-retry"] == "false"
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def vectors_of(reply: Any) -> np.ndarray:
    assert [entry.index for entry in reply.data] == list(range(len(reply.data)))
    return np.array([entry.embedding for entry in reply.data])


# ---- embeddings


@pytest.mark.requirement("SRV-05", "D-08")
def test_floats_and_base64_are_the_same_vectors_of_length_1(client: OpenAI, relaxed: OpenAI) -> None:
    as_floats = client.embeddings.create(model=EMBEDDER, input=TEXTS, encoding_format="float")
    as_base64 = relaxed.embeddings.create(model=EMBEDDER, input=TEXTS)
    for text in TEXTS:  # one by one: which texts share a batch, and so the last bit of a sum, is a matter of time
        one = client.embeddings.create(model=EMBEDDER, input=text, encoding_format="float")
        np.testing.assert_array_equal(vectors_of(one), vectors_of(relaxed.embeddings.create(model=EMBEDDER, input=text)))
    np.testing.assert_allclose(vectors_of(as_floats), vectors_of(as_base64), rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors_of(as_floats), axis=1), 1, atol=1e-5)
    assert (as_floats.object, as_floats.model, as_floats.data[0].object) == ("list", EMBEDDER, "embedding")
    assert as_floats.usage == as_base64.usage
    single = client.embeddings.create(model=EMBEDDER, input=TEXTS[2], encoding_format="float")
    np.testing.assert_allclose(vectors_of(single)[0], vectors_of(as_floats)[2], atol=1e-5)


@pytest.mark.requirement("SRV-05")
def test_token_ids_are_inputs_too(http: httpx2.Client, client: OpenAI) -> None:
    ids = [ask(http, TOKENIZE, model=EMBEDDER, prompt=text)["tokens"] for text in TEXTS]
    by_text = client.embeddings.create(model=EMBEDDER, input=TEXTS, encoding_format="float")
    by_ids = client.embeddings.create(model=EMBEDDER, input=ids, encoding_format="float")
    np.testing.assert_allclose(vectors_of(by_ids), vectors_of(by_text), atol=1e-6)
    assert by_ids.usage == by_text.usage
    assert by_ids.usage.prompt_tokens == sum(map(len, ids))
    one = client.embeddings.create(model=EMBEDDER, input=ids[0], encoding_format="float")
    np.testing.assert_allclose(vectors_of(one)[0], vectors_of(by_text)[0], atol=1e-5)


def test_paraphrases_that_nobody_trained_on_find_each_other(relaxed: OpenAI) -> None:
    from tests.fixtures.make.embedding import groups  # noqa: PLC0415 - it brings MLX with it

    dice = random.Random(77)
    found = 0
    for _ in range(4):
        chosen: dict[tuple[str, ...], list[str]] = {}
        while len(chosen) < 48:
            meaning, forms = groups(dice)
            chosen.setdefault(meaning, dice.sample(forms, 2))
        first, second = (vectors_of(relaxed.embeddings.create(model=EMBEDDER, input=[pair[i] for pair in chosen.values()])) for i in (0, 1))
        found += int(((first @ second.T).argmax(axis=1) == np.arange(48)).sum())
    expected = json.loads((FIXTURE_MODELS / EMBEDDER / "fixture_report.json").read_text())["exact"]
    assert found == expected


def test_langchain_embeds(server: Running, relaxed: OpenAI) -> None:
    langchain = pytest.importorskip("langchain_openai")
    embeddings = langchain.OpenAIEmbeddings(
        model=EMBEDDER,
        base_url=f"{server.url}/v1",
        api_key="none",
        check_embedding_ctx_length=False,  # else it fetches a tokenizer that is not the model's
        chunk_size=3,
        max_retries=0,
    )
    expected = vectors_of(relaxed.embeddings.create(model=EMBEDDER, input=TEXTS))
    np.testing.assert_allclose(embeddings.embed_documents(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(embeddings.embed_query(TEXTS[0]), expected[0], atol=1e-5)


def test_as_many_as_may_be_sent_come_back_in_order(relaxed: OpenAI) -> None:
    texts = [f"{TEXTS[i % 4]} {'apple ' * (i % 97)}{i}" for i in range(2048)]
    vectors = vectors_of(relaxed.embeddings.create(model=EMBEDDER, input=texts))
    for i in (0, 1, 96, 97, 1000, 2047):
        (alone,) = vectors_of(relaxed.embeddings.create(model=EMBEDDER, input=texts[i]))
        np.testing.assert_allclose(vectors[i], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ["a", ""]}, "input[1]", "string_below_min_length"),
        ({"input": []}, "input", "empty_array"),
        ({"input": ["a"] * 2049}, "input", "array_above_max_length"),
        ({"input": [[1], [99999]]}, "input[1]", "invalid_value"),
        ({"dimensions": 32}, "dimensions", "unsupported_value"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_value"),
    ],
)
def test_mistakes_are_named(http: httpx2.Client, fields: dict[str, Any], param: str, code: str) -> None:
    error = refusal(http, EMBEDDINGS, **fields)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")


def test_a_text_that_is_too_long_is_refused_in_the_words_that_clients_know(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.embeddings.create(model=EMBEDDER, input=["fine", "a " * 600], encoding_format="float")
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")
    assert (
        "This model's maximum context length is 512 tokens. However, your messages resulted in 602 tokens. "
        "Please reduce the length of the messages. The text that is too long is 'input[1]'."
    ) in refused.value.message


# ---- beside everybody else


def test_a_chat_goes_on_while_texts_are_embedded_and_they_while_it_does(server: Running, http: httpx2.Client, relaxed: OpenAI) -> None:
    texts = [f"{i} " + "apple " * 90 for i in range(512)]
    with ThreadPoolExecutor(1) as pool, http.stream("POST", "/v1/completions", json=FOR_EVER | {"stream": True}) as response:
        pieces = response.iter_lines()
        assert next(pieces)
        embedding = pool.submit(lambda: relaxed.embeddings.create(model=EMBEDDER, input=texts))
        num_meanwhile = num_after = 0
        for line in pieces:
            if line == "data: [DONE]":
                break
            num_meanwhile += line.startswith("data: ") and not embedding.done()
            num_after += line.startswith("data: ") and embedding.done()
        assert num_meanwhile >= 20, "it stood still"
        assert num_after >= 20, "the vectors had to wait for its end"
        assert len(embedding.result().data) == 512
    server.wait_until_idle(within_s=30)


def test_what_is_asked_for_together_is_what_is_asked_for_alone(server: Running, relaxed: OpenAI) -> None:
    alone = {text: vectors_of(relaxed.embeddings.create(model=EMBEDDER, input=text))[0] for text in TEXTS}
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda i: vectors_of(relaxed.embeddings.create(model=EMBEDDER, input=TEXTS[i % 4]))[0], range(32)))
    for i, vector in enumerate(together):
        np.testing.assert_allclose(vector, alone[TEXTS[i % 4]], atol=1e-5)
    assert server.is_idle()


def test_a_client_that_leaves_is_counted_and_leaves_nothing_behind(server: Running) -> None:
    cancelled = server.metric("mlx_manager_requests_total", outcome="cancelled")
    client = send(server, {"model": EMBEDDER, "input": ["apple " * 400] * 2048}, EMBEDDINGS)
    with server.http() as http:
        while http.get("/api/status").json()["num_in_flight"] == 0:
            pass
    reset(client)
    server.wait_until_idle(within_s=30)
    assert server.metric("mlx_manager_requests_total", outcome="cancelled") == cancelled + 1


def test_requests_and_tokens_are_counted(server: Running, relaxed: OpenAI) -> None:
    def counted() -> tuple[float, float]:
        return (
            server.metric("mlx_manager_requests_total", model=EMBEDDER, outcome="ok"),
            server.metric("mlx_manager_tokens_total", model=EMBEDDER, kind="prompt"),
        )

    requests, tokens = counted()
    used = relaxed.embeddings.create(model=EMBEDDER, input=TEXTS).usage.prompt_tokens
    assert counted() == (requests + 1, tokens + used)


# ---- kinds


def test_the_list_says_what_a_model_is_for(client: OpenAI) -> None:
    models = {m.id: m.model_extra or {} for m in client.models.list()}
    said = {id: (m["kind"], m["features"]) for id, m in models.items()}
    assert said[MODEL] == ("text", ["chat", "completions"])
    assert said[EMBEDDER] == ("embedding", ["embeddings", "rerank"])
    assert said["qwen2_vl"] == ("vision", ["chat", "completions", "images"])
    assert models[EMBEDDER]["max_input_tokens"] == 512


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/chat/completions", {"messages": USER, "stream": True}),
        ("/v1/completions", {"prompt": "Hello"}),
    ],
)
def test_an_embedding_model_that_is_asked_to_talk_says_what_it_does(http: httpx2.Client, path: str, body: dict[str, Any]) -> None:
    error = refusal(http, path, model=EMBEDDER, **body)
    assert error["message"] == f"The model '{EMBEDDER}' makes embeddings: use /v1/embeddings."
    assert (error["param"], error["code"]) == ("model", "invalid_value")


@pytest.mark.parametrize("path", [EMBEDDINGS, RERANK])
def test_a_text_model_that_is_asked_for_vectors_says_what_it_does(http: httpx2.Client, path: str) -> None:
    error = refusal(http, path, model=MODEL)
    assert error["message"] == f"The model '{MODEL}' writes text and makes no embeddings: use /v1/chat/completions."
    assert (error["param"], error["code"]) == ("model", "invalid_value")
    assert http.post(path, json=BASE[path] | {"model": "nobody"}).status_code == 404


# ---- ranking


def test_documents_come_back_with_the_best_first(http: httpx2.Client, relaxed: OpenAI) -> None:
    reply = ask(http, RERANK, documents=[*TEXTS[:2], {"text": "Is it raining in Paris?"}], return_documents=True)
    assert [result["index"] for result in reply["results"]] == [2, 0, 1]
    assert reply["results"][0]["document"] == {"text": "Is it raining in Paris?"}
    query, *documents = vectors_of(relaxed.embeddings.create(model=EMBEDDER, input=["weather in Paris", *TEXTS[:2]]))
    scores = {result["index"]: result["relevance_score"] for result in reply["results"]}
    assert [scores[0], scores[1]] == pytest.approx([float(query @ document) for document in documents], abs=1e-5)
    assert reply["id"].startswith("rerank-")
    assert reply["usage"]["total_tokens"] == reply["usage"]["prompt_tokens"] > 0
    best = ask(http, RERANK, top_n=1)["results"]
    assert [result.keys() for result in best] == [{"index", "relevance_score"}]


def test_a_document_that_is_too_long_is_named(http: httpx2.Client) -> None:
    error = refusal(http, RERANK, documents=["fine", "a " * 600])
    assert (error["param"], error["code"]) == ("documents", "context_length_exceeded")
    assert "'documents[1]'" in error["message"]
    assert refusal(http, RERANK, query="a " * 600)["param"] == "query"


# ---- tokens


def test_tokens_are_those_that_a_request_is_made_of(http: httpx2.Client, client: OpenAI) -> None:
    prompt = ask(http, TOKENIZE, prompt="Count from 1 to 5.")
    used = client.completions.create(model=MODEL, prompt="Count from 1 to 5.", max_tokens=1).usage
    assert used is not None
    assert prompt["count"] == len(prompt["tokens"]) == used.prompt_tokens
    assert prompt["max_model_len"] == 4096
    tool: Any = {"type": "function", "function": {"name": "get_weather", "description": "Get the weather"}}
    for extra in ({}, {"tools": [tool]}, {"enable_thinking": False}):
        conversation = ask(http, TOKENIZE, prompt=..., messages=USER, **extra)
        reply = http.post("/v1/chat/completions", json={"model": MODEL, "messages": USER, "max_tokens": 1, **extra}).json()
        assert conversation["count"] == reply["usage"]["prompt_tokens"]
    rendered = ask(http, DETOKENIZE, tokens=ask(http, TOKENIZE, prompt=..., messages=USER)["tokens"])["prompt"]
    assert rendered.startswith("<|im_start|>user\nWhat is the weather in Paris?<|im_end|>")


@pytest.mark.parametrize("text", ["Count from 1 to 5.", "café 日本 🚀\n\ttwo", ""])
def test_text_goes_to_tokens_and_back(http: httpx2.Client, text: str) -> None:
    reply = ask(http, TOKENIZE, prompt=text, add_special_tokens=False, return_token_strs=True)
    assert ask(http, DETOKENIZE, tokens=reply["tokens"])["prompt"] == text
    assert len(reply["token_strs"]) == reply["count"]


def test_an_embedding_model_has_tokens_too(http: httpx2.Client) -> None:
    with_special = ask(http, TOKENIZE, model=EMBEDDER, prompt="hello", return_token_strs=True)
    assert (with_special["token_strs"][0], with_special["token_strs"][-1]) == ("[CLS]", "[SEP]")
    assert with_special["max_model_len"] == 512
    assert ask(http, TOKENIZE, model=EMBEDDER, prompt="hello", add_special_tokens=False)["count"] == with_special["count"] - 2
    assert ask(http, DETOKENIZE, model=EMBEDDER, tokens=with_special["tokens"])["prompt"] == "[CLS] hello [SEP]"
    assert ask(http, TOKENIZE, model=EMBEDDER, prompt="a " * 600)["count"] == 602, "what is too long is counted all the same"
    assert refusal(http, TOKENIZE, model=EMBEDDER, messages=USER, prompt=None)["param"] == "messages"


def test_tokens_that_are_none_are_refused(http: httpx2.Client) -> None:
    error = refusal(http, DETOKENIZE, tokens=[1, 10**9])
    assert (error["param"], error["code"]) == ("tokens[1]", "invalid_value")


# ---- the field rule


def _fields(kind: str) -> list[tuple[str, str]]:
    return [(path, name) for path, rules in RULES.items() for name, rule in rules.items() if rule.kind == kind]


@pytest.mark.parametrize("path", RULES)
def test_unknown_and_noted_fields_are_named_and_null_is_absent(http: httpx2.Client, path: str) -> None:
    noted = [name for name, rule in RULES[path].items() if rule.kind == "noted"]
    response = http.post(path, json=BASE[path] | dict.fromkeys([*noted, "never_heard_of"], "x"))
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == ",".join([*noted, "never_heard_of"])
    nulls = http.post(path, json=dict.fromkeys([*RULES[path], "never_heard_of"]) | BASE[path])
    assert nulls.status_code == 200
    assert "x-ignored-fields" not in nulls.headers
    assert {k: v for k, v in nulls.json().items() if k != "id"} == {k: v for k, v in response.json().items() if k != "id"}


@pytest.mark.parametrize(("path", "name"), _fields("refused"))
def test_what_is_refused_is_named(http: httpx2.Client, path: str, name: str) -> None:
    for value in ("x", 0, False, []):
        error = refusal(http, path, **{name: value})
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.fixture(autouse=True, scope="module")
def _nothing_goes_wrong_in_the_log(server: Running) -> Any:
    before = len(server.log)
    yield
    written = server.log[before:]
    for sign in ("ERROR", "Traceback", "OUTSIDE", "longer than the specified"):
        assert sign not in written
