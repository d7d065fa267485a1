"""What lies on this machine, usable or not, and what is deleted from it."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from mlx_manager.api.dependencies import Services, ServicesDep
from mlx_manager.api.manage.characteristics import CharacteristicsView, Filters, Judge
from mlx_manager.config import BUNDLED_MODELS
from mlx_manager.core.errors import Conflict, InvalidField, ModelNotFound
from mlx_manager.hub.characteristics import Characteristics, emptied_by
from mlx_manager.hub.checkpoint import Checkpoint
from mlx_manager.hub.deletion import Deletion, Places, carry_out, plan
from mlx_manager.hub.local import UnusableModel, all_models, read_templates
from mlx_manager.inference.families.detect import calls_and_thinks

router = APIRouter(tags=["Models"])


class LocalModelView(BaseModel):
    """`created` is the Unix time of its configuration. `bundled`: it comes with the program and is not deleted."""

    id: str
    folder: str
    created: int
    adapter: str | None
    bundled: bool
    characteristics: CharacteristicsView


class Unusable(BaseModel):
    """`reason`: why it is not served."""

    id: str
    folder: str
    reason: str


class CatalogueView(BaseModel):
    """If no model is left, `emptied_by` is the filter that took the last."""

    models: list[LocalModelView]
    unusable: list[Unusable]
    emptied_by: str | None


class DeletionView(BaseModel):
    """What a deletion would do: `freed_bytes` come free. `is_link`: only a link goes. Deleting it takes the `confirmation`."""

    model: str
    folder: str
    freed_bytes: int
    num_files: int
    is_link: bool
    confirmation: str

    @classmethod
    def of(cls, deletion: Deletion) -> "DeletionView":
        return cls(
            model=deletion.id,
            folder=str(deletion.folder),
            freed_bytes=deletion.freed_bytes,
            num_files=deletion.num_files,
            is_link=deletion.is_link,
            confirmation=deletion.confirmation,
        )


class Which(BaseModel):
    model_config = ConfigDict(extra="forbid")

    revision: str | None = Field(None, max_length=256, description="A commit, of a model in the Hugging Face cache; without it, all.")


class Confirmed(Which):
    confirmation: str | None = Field(None, max_length=64, description="As `/api/models/{id}/deletion` told it.")


@router.get("/api/catalogue")
async def catalogue(wanted: Annotated[Filters, Query()], services: ServicesDep) -> CatalogueView:
    """Every model on this machine that passes the filters, and what lies beside them and cannot be used."""
    found = await asyncio.to_thread(all_models, services.config)
    judge = await Judge.of(services)
    told = await asyncio.to_thread(lambda: [_told(model) for model in found.models])
    failed = [judge.fails(wanted.asked, one) for one in told]
    shown = [one for one, names in zip(told, failed, strict=True) if not names]
    return CatalogueView(
        models=[
            LocalModelView(
                id=one.checkpoint.id,
                folder=str(one.checkpoint.path),
                created=one.checkpoint.created,
                adapter=None if one.checkpoint.adapter is None else one.checkpoint.adapter.name,
                bundled=one.checkpoint.path.is_relative_to(BUNDLED_MODELS),
                characteristics=judge.view(one),
            )
            for one in shown
        ],
        unusable=[Unusable(id=one.id, folder=str(one.path), reason=one.reason) for one in found.unusable],
        emptied_by=None if shown else emptied_by(wanted.asked, failed),
    )


@router.get("/api/models/{model_id:path}/deletion")
async def deletion(model_id: str, which: Annotated[Which, Query()], services: ServicesDep) -> DeletionView:
    """What deleting it would remove and set free. 409 with the reason for what is not deleted."""
    model = await _found(services, model_id)
    told = await asyncio.to_thread(plan, model, Places.of(services.config), which.revision)
    with _withheld(services, model_id):
        return DeletionView.of(told)


@router.delete("/api/models/{model_id:path}")
async def delete(model_id: str, confirmed: Annotated[Confirmed, Query()], services: ServicesDep) -> DeletionView:
    """Deletes a model's files, if what would go is what was told with the `confirmation`. 409 for one that is loaded: unload it first."""
    model = await _found(services, model_id)
    places = Places.of(services.config)
    if confirmed.confirmation is None:
        told = await asyncio.to_thread(plan, model, places, confirmed.revision)
        raise InvalidField(
            f"Deleting '{model_id}' would free {told.freed_bytes:,} bytes. If that is meant, send the 'confirmation' of "
            f"/api/models/{model_id}/deletion.",
            param="confirmation",
            code="confirmation_required",
        )
    with _withheld(services, model_id):
        done = await asyncio.to_thread(carry_out, model, places, confirmed.confirmation, confirmed.revision)
    await services.downloads.forget(model_id)
    await services.pool.refresh()
    return DeletionView.of(done)


async def _found(services: Services, model_id: str) -> Checkpoint | UnusableModel:
    """Raises `ModelNotFound`."""
    found = await asyncio.to_thread(all_models, services.config)
    model = found.find(model_id)
    if model is None:
        raise ModelNotFound(model_id, [one.id for one in found.models])
    return model


@contextmanager
def _withheld(services: Services, model_id: str) -> Generator[None]:
    """Nobody loads it meanwhile. Raises `Conflict` for one that is in use or on its way."""
    if services.downloads.of(model_id) is not None:
        raise Conflict(f"'{model_id}' is being downloaded: cancel that first.", param="model", code="model_in_use")
    with services.pool.withheld(model_id):
        yield


def _told(model: Checkpoint) -> Characteristics:
    config, template = read_templates(model.path)
    tools, thinking = calls_and_thinks(config, template)
    writes = model.kind in ("text", "vision")
    return Characteristics(model, tools and writes, thinking and writes)
