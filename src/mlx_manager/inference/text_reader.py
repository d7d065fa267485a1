"""How a model that measures texts reads them: its tokenizer and its limits. Needs no weights.

A text never becomes a control token: what spells one is read as the letters it is made of.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_manager.core.errors import ContextTooLong, InvalidField
from mlx_manager.core.requests import EmbeddingRequest, RerankRequest


class Tokenizer(Protocol):
    """What we use of a Hugging Face tokenizer."""

    def __call__(self, text: Sequence[str] | Sequence[tuple[str, str]], **options: Any) -> Mapping[str, list[list[int]]]: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...
    def convert_ids_to_tokens(self, ids: int) -> str: ...


@dataclass(frozen=True, slots=True)
class Row:
    """A text as tokens, or two in one. `types` tells one from the other, for models that want to know; empty: all are of the first."""

    tokens: tuple[int, ...]
    types: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows as the model takes them. `dimensions` are what is wanted of each vector; None: all."""

    rows: tuple[Row, ...]
    dimensions: int | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


@dataclass(frozen=True, slots=True)
class TextReader:
    """`context_length` and `vocab_size` in tokens. Vectors have `dimensions`, and can be cut to any of `shorter`.
    `reads_pairs`: it is made for a query and a document in one row, and makes no vectors."""

    tokenizer: Tokenizer
    context_length: int
    vocab_size: int
    dimensions: int
    shorter: Container[int] = ()
    reads_pairs: bool = False

    def prepare(self, request: EmbeddingRequest) -> Prepared:
        """Raises `InvalidField` and `ContextTooLong`."""
        if self.reads_pairs:
            raise InvalidField(f"The model '{request.model}' ranks documents and makes no embeddings: use /v1/rerank.", param="model")
        wanted = request.dimensions
        if wanted is not None and wanted != self.dimensions and wanted not in self.shorter:
            raise InvalidField(
                f"This value of 'dimensions' is not supported: vectors of this model have {self.dimensions} and cannot be cut to {wanted}.",
                param="dimensions",
                code="unsupported_value",
            )
        texts = iter(self.encode([given for given in request.inputs if isinstance(given, str)]))
        rows = [Row(next(texts)) if isinstance(given, str) else Row(given) for given in request.inputs]
        self._check(rows, request.where)
        return Prepared(tuple(rows), wanted)

    def prepare_ranking(self, request: RerankRequest) -> Prepared:
        """A row for each document with the query; or one for the query and one for each document. Raises `ContextTooLong`."""
        where = tuple(f"documents[{i}]" for i in range(len(request.documents)))
        if self.reads_pairs:
            rows = self._pairs(request.query, request.documents)
        else:
            where = ("query", *where)
            rows = [Row(tokens) for tokens in self.encode([request.query, *request.documents])]
        self._check(rows, where)
        return Prepared(tuple(rows))

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[tuple[int, ...]]:
        """Each text as tokens, all of them, however many."""
        if not texts:
            return []
        return [tuple(tokens) for tokens in self._call(texts, add_special_tokens=add_special_tokens)["input_ids"]]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _pairs(self, query: str, documents: Sequence[str]) -> list[Row]:
        read = self._call([(query, document) for document in documents], return_token_type_ids=True)
        return [Row(tuple(tokens), tuple(types)) for tokens, types in zip(read["input_ids"], read["token_type_ids"], strict=True)]

    def _call(self, texts: Sequence[str] | Sequence[tuple[str, str]], **options: Any) -> Mapping[str, list[list[int]]]:
        settings = {
            "add_special_tokens": True,
            "split_special_tokens": True,
            "padding": False,
            "truncation": False,
            "return_attention_mask": False,
            "verbose": False,
        }
        return self.tokenizer(texts, **settings | options)

    def _check(self, rows: Sequence[Row], where: Sequence[str]) -> None:
        for row, place in zip(rows, where, strict=True):
            if not row.tokens:
                raise InvalidField(f"Invalid '{place}': it has no tokens.", param=place)
            if not all(0 <= token < self.vocab_size for token in row.tokens):
                raise InvalidField(f"Invalid '{place}': token ids must be from 0 to {self.vocab_size - 1}.", param=place)
            if len(row.tokens) > self.context_length:
                raise ContextTooLong(limit=self.context_length, tokens=len(row.tokens), where=place)
