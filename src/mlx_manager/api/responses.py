"""`/v1/responses` as clients of the Responses API know it."""

import secrets
import time
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.responses import Response

from mlx_manager.api.answer import answer, client_of, documented_body, event_stream, headers_of, json_reply
from mlx_manager.api.dependencies import ServicesDep
from mlx_manager.api.failures import failure
from mlx_manager.core.errors import ContextTooLong, InvalidField, NotFound
from mlx_manager.gateway.local import prepare
from mlx_manager.protocols.fields import ignored_header
from mlx_manager.protocols.responses import schema
from mlx_manager.protocols.responses.history import History, Item, Kept, item_of, size_of
from mlx_manager.protocols.responses.replies import ResponsesWriter, listed
from mlx_manager.protocols.responses.requests import ResponsesWanted, read_responses
from mlx_manager.protocols.wire import Json

router = APIRouter(tags=["OpenAI Responses"])

_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


@dataclass(frozen=True, slots=True)
class _Past:
    """What is kept for one client."""

    history: History
    client: str

    def response(self, response_id: str) -> Kept | None:
        return self.history.response(self.client, response_id)

    def item(self, item_id: str) -> Item | None:
        return self.history.item(self.client, item_id)


@router.post("/v1/responses", openapi_extra=documented_body(schema.ResponsesRequest))
async def create(request: Request, services: ServicesDep) -> Response:
    """A response to an input, whole or streamed."""
    past = _Past(services.responses, client_of(request))
    wanted = read_responses(await request.body(), past, services.seal)
    writer = ResponsesWriter(
        id=_new_id("resp"),
        model=wanted.request.model,
        created_at=int(time.time()),
        given=wanted.given,
        tools=wanted.tools,
        summarises=wanted.summarises,
        seal=services.seal.seal,
        new_id=_new_id,
        clock=time.time,
        ended=lambda response: _keep(past, wanted, response),
    )
    try:
        return await answer(request, services, wanted, writer)
    except ContextTooLong as error:
        if not wanted.stream:
            raise
        # Told in-band, as upstream does: there are clients that make their history shorter on this event, and give up on a 400.
        return event_stream(writer.failed(failure(error, request.url.path)), headers_of(wanted))


@router.post("/v1/responses/input_tokens", openapi_extra=documented_body(schema.ResponsesRequest))
async def input_tokens(request: Request, services: ServicesDep) -> Response:
    """How many tokens an input has. Loads no weights."""
    wanted = read_responses(await request.body(), _Past(services.responses, client_of(request)), services.seal)
    try:
        prepared = await prepare(services.pool, services.media, services.documents, services.gateway.served(wanted.request))
    except ContextTooLong as error:
        return _counted(error.tokens, headers_of(wanted))
    return _counted(prepared.prompt_tokens, headers_of(wanted, prepared.unused))


@router.get("/v1/responses/{id}")
async def retrieve(id: str, request: Request, services: ServicesDep) -> Response:
    """A response that is still kept."""
    if request.query_params.get("stream", "false").lower() == "true":
        raise InvalidField(
            "'stream' is not supported here: a response that is kept is given whole.", param="stream", code="unsupported_parameter"
        )
    kept = _kept(id, request, services.responses)
    return json_reply(kept.response, _without_effect(request, {"stream"}))


@router.delete("/v1/responses/{id}")
async def delete(id: str, request: Request, services: ServicesDep) -> Response:
    """Lets go of a response, and of the items that no other response has."""
    kept = _kept(id, request, services.responses)
    services.responses.drop(client_of(request), kept.response["id"])
    return json_reply({"id": kept.response["id"], "object": "response", "deleted": True})


@router.get("/v1/responses/{id}/input_items")
async def input_items(id: str, request: Request, services: ServicesDep) -> Response:
    """All that went before a response, the newest first unless `order` is `asc`."""
    kept = _kept(id, request, services.responses)
    query = request.query_params
    order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
    if order not in ("asc", "desc"):
        raise InvalidField("Invalid value for 'order'. Supported values are: 'asc' and 'desc'.", param="order")
    if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:4]) <= 100:
        raise InvalidField("Invalid 'limit': expected an integer from 1 to 100.", param="limit")
    items = [item.json for item in (kept.input if order == "asc" else reversed(kept.input))]
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidField("Invalid 'after': this response has no such item.", param="after")
        items = items[ids.index(after) + 1 :]
    page = [listed(item) for item in items[: int(limit)]]
    first, last = (page[0]["id"], page[-1]["id"]) if page else ("", "")
    return json_reply(
        {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": len(page) < len(items)},
        _without_effect(request, {"order", "limit", "after"}),
    )


def _kept(response_id: str, request: Request, history: History) -> Kept:
    kept = history.response(client_of(request), response_id)
    if kept is None:
        raise NotFound(f"Response with id '{response_id}' not found.")
    return kept


def _keep(past: _Past, wanted: ResponsesWanted, response: Json) -> None:
    if wanted.keeps:
        given = [item if isinstance(item, Item) else item_of(_named(item)) for item in wanted.items]
        made = [item_of(item) for item in response["output"]]
        past.history.keep(past.client, response, given, made, size_of({**response, "output": []}))


def _named(item: Json) -> Json:
    """With an id: the client's own if it gave one."""
    has_id = isinstance(item.get("id"), str)
    return item if has_id else {**item, "id": _new_id(_PREFIXES.get(item.get("type") or "message", "item"))}


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_urlsafe(18)}"


def _counted(num_tokens: int, headers: dict[str, str]) -> Response:
    return json_reply({"object": "response.input_tokens", "input_tokens": num_tokens}, headers)


def _without_effect(request: Request, known: set[str]) -> dict[str, str]:
    names = tuple(dict.fromkeys(name for name in request.query_params if name not in known))
    return {"x-ignored-fields": ignored_header(names)} if names else {}
