"""Downloads from the Hub: they are the server's, and whoever asks sees the same ones."""

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from mlx_manager.api.answer import documented_body
from mlx_manager.api.dependencies import ServicesDep
from mlx_manager.api.manage.body import read_body
from mlx_manager.api.sse import EventStream, event
from mlx_manager.hub.downloads import Changes, Download, Downloads, State
from mlx_manager.protocols.fields import Schema

router = APIRouter(tags=["Downloads"])


class NewDownload(Schema):
    """`revision` is a branch, a tag or a commit; without it, main."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    revision: Annotated[str, Field(min_length=1, max_length=256)] = "main"


class DownloadView(BaseModel):
    """`done_bytes` of `total_bytes` are here; `speed` is in bytes a second, `eta_s` in seconds, both null while nothing can be said.
    `file` is being fetched, or checked if `is_checking`. `error` says why it failed, or was paused by itself."""

    id: str
    model: str
    revision: str
    commit: str
    state: State
    error: str | None
    total_bytes: int
    done_bytes: int
    num_files: int
    file: str | None
    is_checking: bool
    speed: float | None
    eta_s: float | None
    created_ms: int

    @classmethod
    def of(cls, download: Download) -> "DownloadView":
        return cls.model_validate(download, from_attributes=True)


class DownloadList(BaseModel):
    """The oldest first."""

    downloads: list[DownloadView]


class DownloadChanges(DownloadList):
    """`removed` are the ids of those that are gone."""

    removed: list[str]


class Cancellation(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keep: bool = Field(False, description="What has come stays on the disk, for a later download of the model.")


@router.post("/api/downloads", status_code=202, openapi_extra=documented_body(NewDownload))
async def start(request: Request, services: ServicesDep) -> DownloadView:
    """Starts a download, or goes on with the one of this model. 507 if the disk has no room for it, with both numbers."""
    given = read_body(await request.body(), NewDownload)
    return DownloadView.of(await services.downloads.start(given.model, given.revision))


@router.get("/api/downloads")
async def list_downloads(services: ServicesDep) -> DownloadList:
    return DownloadList(downloads=[DownloadView.of(one) for one in services.downloads.all()])


@router.get("/api/downloads/events", response_class=EventStream, status_code=200)
async def events(request: Request, services: ServicesDep) -> EventStream:
    """Server-sent events: `state` has all downloads and comes first; `changes` has what changed since the event before. A client that
    comes back with `Last-Event-ID` gets `changes` at once, if the server still knows what they are."""
    return EventStream(_framed(services.downloads, request.headers.get("last-event-id")))


@router.get("/api/downloads/{id}")
async def get(id: str, services: ServicesDep) -> DownloadView:
    return DownloadView.of(services.downloads.get(id))


@router.post("/api/downloads/{id}/pause")
async def pause(id: str, services: ServicesDep) -> DownloadView:
    """It stays paused, over restarts too, until it is resumed."""
    return DownloadView.of(await services.downloads.pause(id))


@router.post("/api/downloads/{id}/resume")
async def resume(id: str, services: ServicesDep) -> DownloadView:
    """From the byte where it stopped; also one that failed. 507 if the disk has no room for the rest."""
    return DownloadView.of(await services.downloads.resume(id))


@router.delete("/api/downloads/{id}", status_code=204)
async def cancel(id: str, wanted: Annotated[Cancellation, Query()], services: ServicesDep) -> Response:
    """Ends it and forgets it. What has come of the model is removed unless `keep`; of one that is complete, only the entry here is."""
    await services.downloads.cancel(id, keep=wanted.keep)
    return Response(status_code=204)


async def _framed(downloads: Downloads, since: str | None) -> AsyncGenerator[bytes]:
    async for changes in downloads.watch(since):
        yield event("state" if changes.is_whole else "changes", _json(changes), id=changes.position)


def _json(changes: Changes) -> bytes:
    views = [DownloadView.of(one) for one in changes.downloads]
    told = DownloadList(downloads=views) if changes.is_whole else DownloadChanges(downloads=views, removed=list(changes.removed))
    return told.model_dump_json().encode()
