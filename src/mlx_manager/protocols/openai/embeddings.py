"""`POST /v1/embeddings`: what a client sends → vectors wanted → what it reads."""

import base64
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from mlx_manager.core.requests import EmbeddingRequest
from mlx_manager.core.vectors import Embeddings
from mlx_manager.protocols.checked import checked
from mlx_manager.protocols.fields import Rule, Schema, honoured, noted, refused
from mlx_manager.protocols.openai.schema import TokenIds, kind_of_prompt
from mlx_manager.protocols.wire import Json

MAX_INPUTS = 2048
Text = Annotated[str, Field(min_length=1)]
Input = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[TokenIds, Tag("tokens")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS), Tag("texts")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS), Tag("token lists")],
    Discriminator(kind_of_prompt, custom_error_type="text_or_array_type", custom_error_message="neither text nor an array"),
]


class EmbeddingSchema(Schema):
    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None


EMBEDDING_FIELDS: Mapping[str, Rule] = {
    "model": honoured("required; an embedding model of `GET /v1/models`; never downloads"),
    "input": honoured("text, token ids, or up to 2,048 of either; none is ever cut: one that is too long is refused by its name"),
    "encoding_format": honoured("`float` or `base64` (little-endian float32)"),
    "dimensions": honoured("the model's own, or fewer if its configuration says that its vectors can be cut; else refused"),
    "user": noted("kept for nothing until there is an audit log"),
    "api_base": refused("a request cannot choose where it is answered"),
    "api_key": refused("a request cannot choose where it is answered"),
    "priority": refused("priority follows from the key and the endpoint"),
}


@dataclass(frozen=True, slots=True)
class WantedEmbeddings:
    request: EmbeddingRequest
    base64: bool
    ignored: tuple[str, ...]


def read_embeddings(body: bytes) -> WantedEmbeddings:
    """Raises `InvalidField`."""
    wire, ignored = checked(body, EmbeddingSchema, EMBEDDING_FIELDS)
    inputs, where = _inputs(wire.input)
    return WantedEmbeddings(EmbeddingRequest(wire.model, inputs, where, wire.dimensions), wire.encoding_format == "base64", ignored)


def _inputs(given: str | list[int] | list[str] | list[list[int]]) -> tuple[tuple[str | tuple[int, ...], ...], tuple[str, ...]]:
    """Each input, and where it stands."""
    if isinstance(given, str):
        return (given,), ("input",)
    if isinstance(given[0], int):
        return (tuple(token for token in given if isinstance(token, int)),), ("input",)
    inputs = tuple(one if isinstance(one, str) else tuple(one) for one in given if not isinstance(one, int))
    return inputs, tuple(f"input[{i}]" for i in range(len(inputs)))


def write_embeddings(made: Embeddings, wanted: WantedEmbeddings) -> Json:
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": base64.b64encode(vector).decode() if wanted.base64 else _numbers(vector)}
            for i, vector in enumerate(made.vectors)
        ],
        "model": wanted.request.model,
        "usage": {"prompt_tokens": made.prompt_tokens, "total_tokens": made.prompt_tokens},
    }


def _numbers(vector: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))
