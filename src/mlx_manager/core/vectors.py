"""What comes of texts that are measured and not continued: vectors, and how documents rank."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A vector for each input, in their order: little-endian float32 of length 1."""

    vectors: tuple[bytes, ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """A score for each document, in their order; the better a document fits, the higher."""

    scores: tuple[float, ...]
    prompt_tokens: int
