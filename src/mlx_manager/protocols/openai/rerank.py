"""`POST /v1/rerank`, in the shape that Jina and Cohere share: documents in the order in which they answer a query."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from mlx_manager.core.requests import RerankRequest
from mlx_manager.core.vectors import Ranking
from mlx_manager.protocols.checked import checked
from mlx_manager.protocols.fields import Rule, Schema, honoured, noted, refused
from mlx_manager.protocols.wire import Json

MAX_DOCUMENTS = 2048
Text = Annotated[str, Field(min_length=1)]


class Document(Schema):
    text: Text


class RerankSchema(Schema):
    model: Annotated[str, Field(min_length=1, max_length=256)]
    query: Text
    documents: Annotated[list[Text | Document], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None


RERANK_FIELDS: Mapping[str, Rule] = {
    "model": honoured("required; a reranking model (its scores are from 0 to 1) or an embedding model (scores are cosine similarities)"),
    "query": honoured("text"),
    "documents": honoured("1 to 2,048, each text or an object with `text`; none is ever cut: one that is too long is refused by its name"),
    "top_n": honoured("so many results at most; absent: all"),
    "return_documents": honoured("true: each result has its document; absent: false"),
    "user": noted("kept for nothing until there is an audit log"),
    "max_chunks_per_doc": refused("documents are not cut"),
    "max_tokens_per_doc": refused("documents are not cut"),
    "rank_fields": refused("a document is one text"),
    "api_base": refused("a request cannot choose where it is answered"),
    "api_key": refused("a request cannot choose where it is answered"),
    "priority": refused("priority follows from the key and the endpoint"),
}


@dataclass(frozen=True, slots=True)
class WantedRanking:
    request: RerankRequest
    top_n: int | None
    return_documents: bool
    ignored: tuple[str, ...]


def read_rerank(body: bytes) -> WantedRanking:
    """Raises `InvalidField`."""
    wire, ignored = checked(body, RerankSchema, RERANK_FIELDS)
    documents = tuple(given if isinstance(given, str) else given.text for given in wire.documents)
    return WantedRanking(RerankRequest(wire.model, wire.query, documents), wire.top_n, wire.return_documents is True, ignored)


def write_ranking(ranking: Ranking, wanted: WantedRanking, id: str) -> Json:
    """The best first; of equals the one that came first."""
    order = sorted(range(len(ranking.scores)), key=lambda i: -ranking.scores[i])[: wanted.top_n]
    results: list[Json] = [{"index": i, "relevance_score": ranking.scores[i]} for i in order]
    if wanted.return_documents:
        for result in results:
            result["document"] = {"text": wanted.request.documents[result["index"]]}
    usage = {"prompt_tokens": ranking.prompt_tokens, "total_tokens": ranking.prompt_tokens}
    return {"id": id, "model": wanted.request.model, "results": results, "usage": usage}
