"""What clients send to the endpoints that measure, and what they read: pure functions, no server."""

import base64
import json
import struct
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import CreateEmbeddingResponse, embedding_create_params

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Message
from mlx_manager.core.requests import Conversation, EmbeddingRequest, RawPrompt
from mlx_manager.core.vectors import Embeddings, Ranking
from mlx_manager.protocols.fields import Rule
from mlx_manager.protocols.openai.embeddings import EMBEDDING_FIELDS, EmbeddingSchema, read_embeddings, write_embeddings
from mlx_manager.protocols.openai.rerank import RERANK_FIELDS, RerankSchema, read_rerank, write_ranking
from mlx_manager.protocols.openai.tokens import (
    DETOKENIZE_FIELDS,
    TOKENIZE_FIELDS,
    DetokenizeSchema,
    TokenizeSchema,
    read_detokenize,
    read_tokenize,
    write_tokens,
)

Json = dict[str, Any]
TABLES = [
    (EmbeddingSchema, EMBEDDING_FIELDS),
    (RerankSchema, RERANK_FIELDS),
    (TokenizeSchema, TOKENIZE_FIELDS),
    (DetokenizeSchema, DETOKENIZE_FIELDS),
]


def bytes_of(**body: Any) -> bytes:
    return json.dumps({"model": "tiny"} | body).encode()


@pytest.mark.parametrize(("model", "rules"), TABLES)
def test_what_is_read_is_honoured_and_what_is_honoured_is_read(model: type[EmbeddingSchema], rules: dict[str, Rule]) -> None:
    assert model.model_fields.keys() == {name for name, rule in rules.items() if rule.kind == "honoured"}
    assert all(rule.note for rule in rules.values())


def test_every_field_that_the_sdk_documents_has_a_rule() -> None:
    assert get_type_hints(embedding_create_params.EmbeddingCreateParams).keys() - EMBEDDING_FIELDS.keys() == set()


# ---- embeddings


@pytest.mark.parametrize(
    ("given", "inputs", "where"),
    [
        ("hello", ("hello",), ("input",)),
        (["a", "b"], ("a", "b"), ("input[0]", "input[1]")),
        ([5, 6], ((5, 6),), ("input",)),
        ([[5], [6, 7]], ((5,), (6, 7)), ("input[0]", "input[1]")),
        ([" "], (" ",), ("input[0]",)),
    ],
)
def test_the_four_forms_of_input(given: Any, inputs: Any, where: Any) -> None:
    read = read_embeddings(bytes_of(input=given))
    assert read.request == EmbeddingRequest("tiny", inputs, where)
    assert read.request.where == where
    assert (read.base64, read.ignored) == (False, ())


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "input"),
        ({"input": None}, "missing_required_parameter", "input"),
        ({"input": ""}, "string_below_min_length", "input"),
        ({"input": ["a", ""]}, "string_below_min_length", "input[1]"),
        ({"input": []}, "empty_array", "input"),
        ({"input": [[1], []]}, "empty_array", "input[1]"),
        ({"input": ["a"] * 2049}, "array_above_max_length", "input"),
        ({"input": [[1]] * 2049}, "array_above_max_length", "input"),
        ({"input": [1, -1]}, "integer_below_min_value", "input[1]"),
        ({"input": ["a", 1]}, "invalid_type", "input[1]"),
        ({"input": [1, "a"]}, "invalid_type", "input[1]"),
        ({"input": 5}, "invalid_type", "input"),
        ({"input": {"text": "a"}}, "invalid_type", "input"),
        ({"input": "a", "encoding_format": "int8"}, "invalid_value", "encoding_format"),
        ({"input": "a", "dimensions": 0}, "integer_below_min_value", "dimensions"),
        ({"input": "a", "dimensions": "many"}, "invalid_type", "dimensions"),
        ({"input": "a", "model": None}, "missing_required_parameter", "model"),
        ({"input": "a", "api_base": "http://x"}, "unsupported_parameter", "api_base"),
    ],
)
def test_mistakes_are_named(body: Json, code: str, param: str) -> None:
    with pytest.raises(InvalidField) as refused:
        read_embeddings(bytes_of(**body))
    assert (refused.value.code, refused.value.param) == (code, param)


def test_as_many_inputs_as_upstream_takes_are_taken() -> None:
    assert len(read_embeddings(bytes_of(input=["a"] * 2048)).request.inputs) == 2048


def test_what_has_no_effect_is_named_and_null_is_absent() -> None:
    read = read_embeddings(bytes_of(input="a", user="me", never_heard_of=1, dimensions=None, encoding_format=None))
    assert read.ignored == ("user", "never_heard_of")
    assert read.request.dimensions is None


@given(st.lists(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8), min_size=1, max_size=4))
def test_both_encodings_say_the_same_numbers_bit_for_bit(vectors: list[list[float]]) -> None:
    made = Embeddings(tuple(struct.pack(f"<{len(v)}f", *v) for v in vectors), 5)
    as_floats = write_embeddings(made, read_embeddings(bytes_of(input="a")))
    as_base64 = write_embeddings(made, read_embeddings(bytes_of(input="a", encoding_format="base64")))
    assert [entry["embedding"] for entry in as_floats["data"]] == vectors
    decoded = [base64.b64decode(entry["embedding"]) for entry in as_base64["data"]]
    assert [list(struct.unpack(f"<{len(raw) // 4}f", raw)) for raw in decoded] == vectors
    CreateEmbeddingResponse.model_validate(as_floats, strict=True)
    assert [entry["index"] for entry in as_floats["data"]] == list(range(len(vectors)))
    assert as_floats["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


# ---- ranking


def test_documents_are_texts_or_objects_with_one() -> None:
    read = read_rerank(bytes_of(query="q", documents=["a", {"text": "b", "id": 7}], top_n=1))
    assert (read.request.query, read.request.documents, read.top_n) == ("q", ("a", "b"), 1)
    assert (read.return_documents, read.ignored) == (False, ("documents.id",))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"query": None}, "query"),
        ({"query": ""}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": ["a", ""]}, "documents[1]"),
        ({"documents": ["a", 5]}, "documents[1]"),
        ({"documents": [{"title": "a"}]}, "documents[0].text"),
        ({"documents": ["a"] * 2049}, "documents"),
        ({"top_n": 0}, "top_n"),
        ({"return_documents": "yes"}, "return_documents"),
        ({"max_chunks_per_doc": 3}, "max_chunks_per_doc"),
    ],
)
def test_mistakes_of_a_ranking_are_named(body: Json, param: str) -> None:
    with pytest.raises(InvalidField) as refused:
        read_rerank(bytes_of(**{"query": "q", "documents": ["a"], **body}))
    assert refused.value.param == param


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9), st.none() | st.integers(1, 12), st.booleans())
def test_the_best_comes_first_and_of_equals_the_first(scores: list[float], top_n: int | None, return_documents: bool) -> None:
    documents = [f"document {i}" for i in range(len(scores))]
    wanted = read_rerank(bytes_of(query="q", documents=documents, top_n=top_n, return_documents=return_documents))
    reply = write_ranking(Ranking(tuple(scores), 9), wanted, "rerank-1")
    results = reply["results"]
    assert len(results) == min(len(scores), len(scores) if top_n is None else top_n)
    keys = [(-r["relevance_score"], r["index"]) for r in results]
    assert keys == sorted((-score, i) for i, score in enumerate(scores))[: len(results)]
    for result in results:
        assert result.get("document") == ({"text": documents[result["index"]]} if return_documents else None)
    assert (reply["id"], reply["model"], reply["usage"]["total_tokens"]) == ("rerank-1", "tiny", 9)


# ---- tokens


def test_a_prompt_or_a_conversation_is_tokenized() -> None:
    text = read_tokenize(bytes_of(prompt="hello", add_special_tokens=False))
    assert (text.prompt, text.add_special_tokens, text.token_strs) == (RawPrompt("hello"), False, False)
    assert read_tokenize(bytes_of(prompt="")).prompt == RawPrompt("")
    tool = {"type": "function", "function": {"name": "f"}}
    chat = read_tokenize(bytes_of(messages=[{"role": "user", "content": "hi"}], tools=[tool], enable_thinking=False, temperature=1))
    assert isinstance(chat.prompt, Conversation)
    assert chat.prompt.messages == (Message("user", "hi"),)
    assert (chat.prompt.tools[0].name, chat.prompt.reasoning.enabled) == ("f", False)
    assert chat.ignored == ("temperature",)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"prompt": "a", "tools": []}, "tools"),
        ({"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": [{"role": "user", "content": "x"}], "continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x"),
        ({"prompt": "a", "chat_template": "x"}, "chat_template"),
    ],
)
def test_mistakes_of_a_tokenize_request_are_named(body: Json, param: str) -> None:
    with pytest.raises(InvalidField) as refused:
        read_tokenize(bytes_of(**body))
    assert refused.value.param == param


def test_tokens_are_written_as_vllm_does() -> None:
    assert write_tokens((1, 2), 512, None) == {"tokens": [1, 2], "count": 2, "max_model_len": 512}
    assert write_tokens((1,), 512, ["a"])["token_strs"] == ["a"]
    assert read_detokenize(bytes_of(tokens=[1, 2])).tokens == (1, 2)
    assert read_detokenize(bytes_of(tokens=[])).tokens == ()
    with pytest.raises(InvalidField) as refused:
        read_detokenize(bytes_of(tokens=[1, "a"]))
    assert refused.value.param == "tokens[1]"
