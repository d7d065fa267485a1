"""Downloads from a Hub on loopback into a real cache: through the real client, transfer, files and database."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import scan_cache_dir, snapshot_download

from mlx_manager.core.errors import Conflict, HubRefused, HubUnavailable, InvalidField, NotFound, StorageFull
from mlx_manager.hub.client import Hub
from mlx_manager.hub.downloads import SPARE_BYTES, Download, Downloads
from mlx_manager.hub.local import find_models
from mlx_manager.hub.store import DownloadStore
from mlx_manager.hub.transfer import Retries
from mlx_manager.storage.database import Database
from tests.hub.hub_server import HubServer, serving_hub

FIXTURE = Path(__file__).parents[1] / "fixtures" / "models" / "qwen3"
MODEL = "someone/small"
WEIGHTS = (FIXTURE / "model.safetensors").read_bytes()
QUICK = Retries(attempts=3, timeout_s=10, wait_initial_s=0.01, wait_max_s=0.02)
ROOMY = 1 << 50


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving_hub() as server:
        server.add(MODEL, FIXTURE)
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@asynccontextmanager
async def downloading(
    hub: HubServer, cache: Path, *, token: str | None = None, timeout_s: float = 10, is_offline: bool = False, **options: Any
) -> AsyncIterator[Downloads]:
    """As a server has them: what was under way goes on. `done` gets the models that are complete."""
    database = Database(cache.parent / "data" / "test.db")
    await database.open()
    client = Hub(hub.url, timeout_s=timeout_s, token=lambda: token, is_offline=is_offline)

    async def on_done(model: str) -> None:
        options_done.append(model)

    options_done: list[str] = options.pop("done", [])
    settings: dict[str, Any] = {"at_once": 2, "retries": QUICK, "free_bytes": lambda _: ROOMY} | options
    downloads = Downloads(client, DownloadStore(database), cache, on_done=on_done, **settings)
    await downloads.open()
    try:
        yield downloads
    finally:
        await downloads.close()
        await client.close()
        await database.close()


async def until(downloads: Downloads, id: str, is_so: Callable[[Download], bool], within_s: float = 15) -> Download:
    async with asyncio.timeout(within_s):
        async for _ in downloads.watch():
            if is_so(now := downloads.get(id)):
                return now
    raise AssertionError


async def ended(downloads: Downloads, id: str) -> Download:
    return await until(downloads, id, lambda d: d.state in ("done", "failed", "paused"))


async def fetched(downloads: Downloads, model: str = MODEL) -> Download:
    done = await ended(downloads, (await downloads.start(model)).id)
    assert (done.state, done.error) == ("done", None)
    return done


def repository(cache: Path, model: str = MODEL) -> Path:
    return cache / f"models--{model.replace('/', '--')}"


def part(cache: Path, data: bytes = WEIGHTS) -> Path:
    return repository(cache) / "blobs" / f"{hashlib.sha256(data).hexdigest()}.part"


def tree(folder: Path) -> dict[str, str | bytes]:
    """Names, with what links lead to and what files hold."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


# ---- what is there afterwards


async def test_a_download_is_what_the_official_client_makes_and_reads_offline(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    done: list[str] = []
    async with downloading(hub, cache, done=done) as downloads:
        now = await fetched(downloads)
    assert (now.done_bytes, now.total_bytes, done) == (sum(f.stat().st_size for f in FIXTURE.iterdir() if f.suffix != ".md"),) * 2 + (
        [MODEL],
    )

    folder = snapshot_download(MODEL, cache_dir=cache, local_files_only=True)
    assert {p.name: p.read_bytes() for p in Path(folder).iterdir()} == {p.name: p.read_bytes() for p in FIXTURE.iterdir()}
    scanned = scan_cache_dir(cache)
    assert scanned.warnings == []
    ((revision,),) = [repo.revisions for repo in scanned.repos]
    assert (revision.commit_hash, revision.refs) == (hub.repos[MODEL].commit, frozenset({"main"}))
    (model,) = find_models([], cache).models
    assert (model.id, model.kind) == (MODEL, "text")

    theirs = tmp_path / "theirs"
    await asyncio.to_thread(snapshot_download, MODEL, cache_dir=theirs, endpoint=hub.url)
    assert tree(repository(cache)) == {name: what for name, what in tree(repository(theirs)).items() if not name.startswith("trees/")}
