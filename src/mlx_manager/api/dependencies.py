"""What the routes are handed: built once in `app.py`, found on the application."""

from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends, Request

from mlx_manager.config import Config
from mlx_manager.gateway.documents import Documents
from mlx_manager.gateway.gateway import Gateway
from mlx_manager.gateway.remote_media import RemoteMedia
from mlx_manager.hub.client import Hub
from mlx_manager.hub.downloads import Downloads
from mlx_manager.hub.search import Search
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.pool import Pool
from mlx_manager.protocols.responses.history import History
from mlx_manager.protocols.seal import Seal
from mlx_manager.settings.findings import Findings
from mlx_manager.settings.store import Register
from mlx_manager.storage.database import Database
from mlx_manager.telemetry import Metrics


@dataclass(frozen=True, slots=True)
class Services:
    """`probing` are the models that are being probed now."""

    config: Config
    device: Device
    pool: Pool
    media: RemoteMedia
    documents: Documents
    gateway: Gateway
    database: Database
    register: Register
    findings: Findings
    metrics: Metrics
    seal: Seal
    responses: History
    hub: Hub
    search: Search
    downloads: Downloads
    probing: set[str] = field(default_factory=set[str])


def _services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


ServicesDep = Annotated[Services, Depends(_services)]
