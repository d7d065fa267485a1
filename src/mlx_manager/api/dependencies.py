"""What the routes are handed: built once in `app.py`, found on the application."""

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from mlx_manager.config import Config
from mlx_manager.gateway.gateway import Gateway
from mlx_manager.gateway.remote_media import RemoteMedia
from mlx_manager.hub.client import Hub
from mlx_manager.hub.downloads import Downloads
from mlx_manager.hub.search import Search
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.pool import Pool
from mlx_manager.protocols.responses.history import History
from mlx_manager.protocols.seal import Seal
from mlx_manager.storage.database import Database
from mlx_manager.telemetry import Metrics


@dataclass(frozen=True, slots=True)
class Services:
    config: Config
    device: Device
    pool: Pool
    media: RemoteMedia
    gateway: Gateway
    database: Database
    metrics: Metrics
    seal: Seal
    responses: History
    hub: Hub
    search: Search
    downloads: Downloads


def _services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


ServicesDep = Annotated[Services, Depends(_services)]
