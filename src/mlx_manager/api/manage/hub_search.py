"""Searching the Hub: what its list says at once, and what each model is as soon as it is known."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from mlx_manager.api.dependencies import Services, ServicesDep
from mlx_manager.api.manage.characteristics import CharacteristicsView, Filters, Judge
from mlx_manager.api.sse import EventStream, event
from mlx_manager.hub.characteristics import Filter, emptied_by
from mlx_manager.hub.client import check_repository
from mlx_manager.hub.search import Inspection, Listed, Sort
from mlx_manager.hub.search import Query as HubQuery

router = APIRouter(tags=["Hub"])

ANY = "any"


class HubState(BaseModel):
    """`state` offline: HF_HUB_OFFLINE is set, and nobody is asked. `has_token`: gated and private models can be had."""

    endpoint: str
    state: str
    has_token: bool


class SearchQuery(Filters):
    q: str = Field("", max_length=200, description="Part of the name.")
    organisation: str = Field("mlx-community", max_length=100, description=f"'{ANY}': all of them.")
    mlx_only: bool = Field(True, description="What is marked as made for MLX.")
    sort: Sort = "downloads"
    limit: int = Field(20, ge=1, le=100)
    cursor: str | None = Field(None, max_length=4096)


class Result(BaseModel):
    """`characteristics` null: not known yet, or `reason` says why they are not; `matches` null: not known yet. `updated` is a Unix time.
    `is_here`: it is on this machine; `download` is the id of the one that is under way."""

    id: str
    organisation: str
    downloads: int
    likes: int
    updated: int | None
    is_gated: bool
    architecture: str | None
    is_here: bool
    download: str | None
    characteristics: CharacteristicsView | None
    reason: str | None
    matches: bool | None


class Results(BaseModel):
    """Of one page, without those that are known not to match: their number is `num_hidden`. Of what is `pending`,
    `/api/hub/characteristics` tells what it is, or why that cannot be known. If nothing is left, `emptied_by` is the filter that took the
    last. `cursor` leads on."""

    results: list[Result]
    pending: list[str]
    num_hidden: int
    emptied_by: str | None
    cursor: str | None


class Told(BaseModel):
    """`reason`: why it cannot be used, or could not be looked into."""

    id: str
    characteristics: CharacteristicsView | None
    reason: str | None
    matches: bool


class CharacteristicsQuery(Filters):
    model: list[Annotated[str, Field(max_length=256)]] = Field(min_length=1, max_length=100)


@router.get("/api/hub")
async def state(services: ServicesDep) -> HubState:
    """Which Hub is asked, and whether it may be. Asks nobody."""
    hub = services.hub
    return HubState(endpoint=hub.endpoint, state="offline" if hub.is_offline else "online", has_token=await hub.has_token())


@router.get("/api/hub/search")
async def search(wanted: Annotated[SearchQuery, Query()], services: ServicesDep) -> Results:
    """Answers with what the Hub's list says, and with what is known of each model already. 503 if the Hub does not answer in time."""
    query = HubQuery(
        text=wanted.q,
        organisation=None if wanted.organisation == ANY else wanted.organisation,
        mlx_only=wanted.mlx_only,
        sort=wanted.sort,
        limit=wanted.limit,
        cursor=wanted.cursor,
    )
    page = await services.search.find(query)
    await services.pool.refresh()
    judge = await Judge.of(services)
    asked = wanted.asked
    here = {status.checkpoint.id for status in services.pool.statuses()}
    known = {model.id: found for model in page.models if (found := services.search.known(model.id)) is not None}
    failed = {id: _fails(judge, asked, found) for id, found in known.items()}
    shown = [model for model in page.models if not failed.get(model.id)]
    return Results(
        results=[_result(services, judge, model, known.get(model.id), model.id in here, not asked.active) for model in shown],
        pending=[model.id for model in shown if model.id not in known],
        num_hidden=len(page.models) - len(shown),
        emptied_by=None if shown else emptied_by(asked, failed.values()),
        cursor=page.cursor,
    )


@router.get("/api/hub/characteristics", response_class=EventStream, status_code=200)
async def characteristics(wanted: Annotated[CharacteristicsQuery, Query()], services: ServicesDep) -> EventStream:
    """Server-sent events: `characteristics` for each model as soon as it is known, or why it will not be, then `done`."""
    ids = list(dict.fromkeys(wanted.model))
    for id in ids:
        check_repository(id)
    return EventStream(_as_known(services, await Judge.of(services), wanted.asked, ids))


def _fails(judge: Judge, asked: Filter, found: Inspection) -> tuple[str, ...]:
    """Of what cannot be used nobody can say that it matches."""
    return asked.active if found.told is None else judge.fails(asked, found.told)


def _result(services: Services, judge: Judge, model: Listed, known: Inspection | None, is_here: bool, all_match: bool) -> Result:
    download = services.downloads.of(model.id)
    return Result(
        id=model.id,
        organisation=model.id.partition("/")[0],
        downloads=model.downloads,
        likes=model.likes,
        updated=model.updated,
        is_gated=model.is_gated,
        architecture=model.architecture,
        is_here=is_here,
        download=None if download is None else download.id,
        characteristics=None if known is None or known.told is None else judge.view(known.told),
        reason=None if known is None else known.reason,
        matches=True if all_match or known is not None else None,
    )


async def _as_known(services: Services, judge: Judge, asked: Filter, ids: Sequence[str]) -> AsyncGenerator[bytes]:
    waiting = [asyncio.create_task(services.search.inspect(id)) for id in ids]
    try:
        for inspecting in asyncio.as_completed(waiting):
            found = await inspecting
            told = Told(
                id=found.id,
                characteristics=None if found.told is None else judge.view(found.told),
                reason=found.reason,
                matches=not _fails(judge, asked, found),
            )
            yield event("characteristics", told.model_dump_json().encode())
    finally:
        for task in waiting:
            task.cancel()
    yield event("done", b"{}")
