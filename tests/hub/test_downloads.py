"""Downloads from a Hub on loopback into a real cache: through the real client, transfer, files and database."""

import asyncio
import hashlib
import json
import os
import resource
import threading
import time
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
from mlx_manager.hub.repository import Part
from mlx_manager.hub.store import DownloadRecord, DownloadStore
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


def is_flowing(download: Download) -> bool:
    """Whether its weights are on their way."""
    return download.done_bytes > download.total_bytes - len(WEIGHTS)


def repository(cache: Path, model: str = MODEL) -> Path:
    return cache / f"models--{model.replace('/', '--')}"


def part(cache: Path, data: bytes = WEIGHTS) -> Path:
    return repository(cache) / "blobs" / f"{hashlib.sha256(data).hexdigest()}.part"


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def paths(folder: Path) -> list[Path]:
    return list(folder.rglob("*"))


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
    assert now.done_bytes == now.total_bytes == sum(len(data) for data in hub.repos[MODEL].files.values())
    assert done == [MODEL]

    assert contents(snapshot_download(MODEL, cache_dir=cache, local_files_only=True)) == hub.repos[MODEL].files
    scanned = scan_cache_dir(cache)
    assert scanned.warnings == []
    ((revision,),) = [repo.revisions for repo in scanned.repos]
    assert (revision.commit_hash, revision.refs) == (hub.repos[MODEL].commit, frozenset({"main"}))
    (model,) = find_models([], cache).models
    assert (model.id, model.kind) == (MODEL, "text")

    theirs = tmp_path / "theirs"
    await asyncio.to_thread(snapshot_download, MODEL, cache_dir=theirs, endpoint=hub.url)
    assert tree(repository(cache)) == {name: what for name, what in tree(repository(theirs)).items() if not name.startswith("trees/")}


async def test_nothing_but_what_a_model_is_loaded_from_is_fetched(hub: HubServer, cache: Path) -> None:
    bad = dict.fromkeys(("pytorch_model.bin", "modeling.py", "x.pkl", "y.pt", "onnx/model.onnx", ".cache/z.json", "README.md"), b"evil")
    hub.repos[MODEL].files |= bad | {"consolidated.safetensors": b"again", "tokenizer.model": b"pieces"}
    async with downloading(hub, cache) as downloads:
        await fetched(downloads)
    asked = {one.path.rpartition("/")[2] for one in hub.seen}
    assert not asked & {name.rpartition("/")[2] for name in bad} | {"consolidated.safetensors"} & asked
    assert (repository(cache) / "snapshots" / hub.repos[MODEL].commit / "tokenizer.model").read_bytes() == b"pieces"


async def test_another_revision_fetches_only_what_is_different(hub: HubServer, cache: Path) -> None:
    async with downloading(hub, cache) as downloads:
        first = await fetched(downloads)
        hub.repos[MODEL].files["generation_config.json"] = b"{}"
        second = await fetched(downloads)
        assert [one.id for one in downloads.all()] == [second.id]
    assert first.commit != second.commit
    assert len(hub.fetched(WEIGHTS)) == 1
    assert (repository(cache) / "refs" / "main").read_text() == second.commit
    assert {path.name for path in (repository(cache) / "snapshots").iterdir()} == {first.commit, second.commit}


async def test_what_another_tool_left_half_done_is_finished_and_its_own_leftovers_stay(hub: HubServer, cache: Path) -> None:
    theirs = repository(cache) / "blobs" / "0123.incomplete"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"half")
    await asyncio.to_thread(snapshot_download, MODEL, cache_dir=cache, endpoint=hub.url, allow_patterns="*.json")
    assert find_models([], cache).models == ()
    async with downloading(hub, cache) as downloads:
        await fetched(downloads)
    assert [model.id for model in find_models([], cache).models] == [MODEL]
    assert theirs.read_bytes() == b"half"


# ---- interruptions


async def test_a_connection_that_breaks_is_taken_up_at_the_byte(hub: HubServer, cache: Path) -> None:
    hub.cuts = [200_000, 300_000]
    async with downloading(hub, cache) as downloads:
        await fetched(downloads)
    requests = hub.fetched(WEIGHTS)
    assert [one.start for one in requests] == [None, 200_000, 500_000]
    assert {one.headers.get("if-range") for one in requests[1:]} == {f'"{hashlib.sha256(WEIGHTS).hexdigest()[:8]}-v1"'}


async def test_a_paused_download_stays_paused_over_a_restart_and_goes_on_at_the_byte(hub: HubServer, cache: Path) -> None:
    hub.hold = threading.Event()
    async with downloading(hub, cache) as downloads:
        id = (await downloads.start(MODEL)).id
        await until(downloads, id, is_flowing)
        paused = await downloads.pause(id)
        assert (paused.state, paused.error, paused.speed) == ("paused", None, None)
        assert (await downloads.pause(id)).state == "paused"
    hub.hold.set()
    have = part(cache).stat().st_size
    assert 0 < have < len(WEIGHTS)
    assert find_models([], cache).models == ()
    num_before = len(hub.seen)
    async with downloading(hub, cache) as downloads:
        await asyncio.sleep(0.2)
        (still,) = downloads.all()
        assert (still.id, still.state, len(hub.seen)) == (id, "paused", num_before)
        assert still.done_bytes >= have
        assert (await downloads.start(MODEL)).id == id  # to ask for it again is to go on
        assert (await ended(downloads, id)).state == "done"
    assert [one.start for one in hub.fetched(WEIGHTS)] == [None, have]


async def test_pausing_and_resuming_at_any_moment_holds_nothing_back(hub: HubServer, cache: Path) -> None:
    hub.bytes_per_s = 3_000_000
    async with downloading(hub, cache) as downloads:
        id = (await downloads.start(MODEL)).id
        for moment in range(12):
            await asyncio.sleep(moment * 0.007)
            if (await downloads.pause(id) if downloads.get(id).state != "done" else downloads.get(id)).state == "done":
                break
            await downloads.resume(id)
        assert (await ended(downloads, id)).state == "done"
    assert contents(snapshot_download(MODEL, cache_dir=cache, local_files_only=True)) == hub.repos[MODEL].files


async def test_what_was_under_way_goes_on_at_the_next_start(hub: HubServer, cache: Path) -> None:
    hub.bytes_per_s = 400_000
    async with downloading(hub, cache) as downloads:
        id = (await downloads.start(MODEL)).id
        now = await until(downloads, id, lambda d: d.done_bytes > 300_000)
        assert now.state == "downloading"
    hub.bytes_per_s = None
    have = part(cache).stat().st_size
    async with downloading(hub, cache) as downloads:
        assert (await ended(downloads, id)).state == "done"
    assert hub.fetched(WEIGHTS)[-1].start == have > 0


@pytest.mark.parametrize("fault", ["ignores ranges", "another version", "another version, and ignores the condition"])
async def test_a_host_without_the_rest_of_the_same_file_is_asked_for_all_of_it(hub: HubServer, cache: Path, fault: str) -> None:
    hub.cuts = [200_000]
    async with downloading(hub, cache, retries=Retries(attempts=5, wait_initial_s=0.3, wait_max_s=0.3)) as downloads:
        id = (await downloads.start(MODEL)).id
        await until(downloads, id, lambda d: part(cache).exists() and part(cache).stat().st_size > 0)
        hub.ignores_ranges = fault == "ignores ranges"
        hub.version = "v1" if hub.ignores_ranges else "v2"
        hub.ignores_if_range = fault.endswith("condition")
        assert (await ended(downloads, id)).state == "done"
    assert contents(snapshot_download(MODEL, cache_dir=cache, local_files_only=True))["model.safetensors"] == WEIGHTS


async def test_a_beginning_that_was_of_something_else_is_fetched_anew(hub: HubServer, cache: Path) -> None:
    part(cache).parent.mkdir(parents=True)
    part(cache).write_bytes(b"x" * 1000)
    async with downloading(hub, cache) as downloads:
        await fetched(downloads)
    assert [one.start for one in hub.fetched(WEIGHTS)] == [1000, None]


@pytest.mark.parametrize("path", ["model.safetensors", "tokenizer.json"])
async def test_what_has_another_checksum_is_removed_and_can_be_tried_again(hub: HubServer, cache: Path, path: str) -> None:
    hub.corrupts = {path}
    async with downloading(hub, cache) as downloads:
        failed = await ended(downloads, (await downloads.start(MODEL)).id)
        assert (failed.state, failed.error) == (
            "failed", f"What the Hub sent as {path} is not what it says the file holds: its checksum is another."
        )  # fmt: skip
        assert list(repository(cache).rglob("*.part")) == []
        assert find_models([], cache).models == ()
        hub.corrupts = set()
        await downloads.resume(failed.id)
        assert (await ended(downloads, failed.id)).state == "done"


async def test_a_host_that_wants_to_be_left_alone_for_a_while_is(hub: HubServer, cache: Path) -> None:
    hub.statuses = [("cdn", 429, {"retry-after": "1"}), ("cdn", 503, {}), ("cdn", 403, {})]
    began = time.monotonic()
    async with downloading(hub, cache, retries=Retries(attempts=4, wait_initial_s=0.01)) as downloads:
        await fetched(downloads)
    assert time.monotonic() - began >= 1
    assert len(hub.fetched(WEIGHTS)) == 4


async def test_a_host_that_wants_to_be_left_alone_for_long_fails_it_with_the_reason(hub: HubServer, cache: Path) -> None:
    hub.statuses = [("cdn", 429, {"retry-after": "86400"})]
    async with downloading(hub, cache) as downloads:
        failed = await ended(downloads, (await downloads.start(MODEL)).id)
        assert (failed.state, "fewer requests" in (failed.error or "")) == ("failed", True)
        await downloads.resume(failed.id)
        assert (await ended(downloads, failed.id)).state == "done"


async def test_a_host_that_sends_nothing_fails_it_after_the_time_limit(hub: HubServer, cache: Path) -> None:
    hub.silent = {"cdn"}
    async with downloading(hub, cache, timeout_s=0.3, retries=Retries(attempts=2, wait_initial_s=0.01)) as downloads:
        failed = await ended(downloads, (await downloads.start(MODEL)).id)
        assert failed.error == f"The Hub at {hub.url[7:]} cannot be reached: it did not answer in time."


async def test_another_program_at_the_same_file_is_waited_for(hub: HubServer, cache: Path) -> None:
    path = part(cache)
    path.parent.mkdir(parents=True)
    other = Part(path)
    assert other.open()
    async with downloading(hub, cache) as downloads:
        id = (await downloads.start(MODEL)).id
        await until(downloads, id, lambda d: d.file == "model.safetensors")
        await asyncio.sleep(0.2)
        other.append(WEIGHTS)
        other.finish(path.with_suffix(""))
        other.close()
        assert (await ended(downloads, id)).state == "done"
    assert hub.fetched(WEIGHTS) == []


# ---- the disk


async def test_a_model_without_room_is_refused_with_both_numbers_before_anything_is_fetched(hub: HubServer, cache: Path) -> None:
    needed = sum(len(data) for data in hub.repos[MODEL].files.values())
    async with downloading(hub, cache, free_bytes=lambda _: SPARE_BYTES + needed - 1) as downloads:
        with pytest.raises(StorageFull) as refused:
            await downloads.start(MODEL)
        assert f"needs {needed:,} bytes" in refused.value.message
        assert f"{SPARE_BYTES + needed - 1:,} are free" in refused.value.message
        assert downloads.all() == ()
    assert paths(cache) == []
    assert hub.asked("cdn") == []


async def test_room_is_counted_beside_what_others_still_need(hub: HubServer, cache: Path) -> None:
    hub.add("someone/other", FIXTURE)
    hub.hold = threading.Event()
    needed = sum(len(data) for data in hub.repos[MODEL].files.values())
    async with downloading(hub, cache, free_bytes=lambda _: SPARE_BYTES + needed + needed // 2) as downloads:
        await downloads.start(MODEL)
        with pytest.raises(StorageFull, match=r"beside the [0-9,]+ that other downloads still need"):
            await downloads.start("someone/other")


async def test_a_disk_that_fills_up_pauses_it_and_what_came_is_used_later(hub: HubServer, cache: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with downloading(hub, cache) as downloads:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            paused = await ended(downloads, (await downloads.start(MODEL)).id)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert paused.state == "paused"
        assert (paused.error or "").startswith(f"The disk is full: {len(WEIGHTS) - (1 << 20):,} bytes of model.safetensors")
        await downloads.resume(paused.id)
        assert (await ended(downloads, paused.id)).state == "done"
    assert hub.fetched(WEIGHTS)[-1].start == 1 << 20


async def test_a_folder_that_may_not_be_written_fails_it_with_the_reason(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    async with downloading(hub, tmp_path / "cache") as downloads:
        failed = await ended(downloads, (await downloads.start(MODEL)).id)
        assert (failed.state, failed.error) == ("failed", "It cannot be put into the cache: Not a directory.")


@pytest.mark.parametrize("name", ["", "blobs", "snapshots"])
async def test_nothing_is_written_through_a_link_that_leads_out_of_the_cache(
    hub: HubServer, cache: Path, tmp_path: Path, name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = repository(cache) / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere)
    async with downloading(hub, cache) as downloads:
        failed = await ended(downloads, (await downloads.start(MODEL)).id)
        assert "is a link that leads elsewhere" in (failed.error or "")
    assert [path for path in elsewhere.rglob("*") if path.is_file()] == []


async def test_a_part_that_is_a_link_is_not_written_through(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    part(cache).parent.mkdir(parents=True)
    part(cache).symlink_to(victim)
    async with downloading(hub, cache) as downloads:
        failed = await ended(downloads, (await downloads.start(MODEL)).id)
        assert failed.state == "failed"
    assert victim.read_text() == "mine"


# ---- cancelling


async def test_a_cancelled_download_leaves_nothing(hub: HubServer, cache: Path) -> None:
    hub.hold = threading.Event()
    async with downloading(hub, cache) as downloads:
        id = (await downloads.start(MODEL)).id
        await until(downloads, id, is_flowing)
        await downloads.cancel(id)
        assert downloads.all() == ()
        with pytest.raises(NotFound):
            downloads.get(id)
    assert paths(cache) == []
    async with downloading(hub, cache) as downloads:
        assert downloads.all() == ()


async def test_a_cancelled_download_can_leave_what_came_for_another_day(hub: HubServer, cache: Path) -> None:
    hub.hold = threading.Event()
    async with downloading(hub, cache) as downloads:
        id = (await downloads.start(MODEL)).id
        await until(downloads, id, is_flowing)
        await downloads.cancel(id, keep=True)
    hub.hold.set()
    have = part(cache).stat().st_size
    async with downloading(hub, cache) as downloads:
        await fetched(downloads)
    assert hub.fetched(WEIGHTS)[-1].start == have > 0


async def test_cancelling_leaves_alone_what_others_use_or_left(hub: HubServer, cache: Path) -> None:
    async with downloading(hub, cache) as downloads:
        await downloads.cancel((await fetched(downloads)).id)  # it is complete: only its entry goes
        assert [model.id for model in find_models([], cache).models] == [MODEL]
        hub.repos[MODEL].files["model.safetensors"] = WEIGHTS + b"more"
        theirs = repository(cache) / "blobs" / "stranger.part"
        theirs.write_bytes(b"half")
        before = tree(repository(cache))
        hub.hold = threading.Event()
        id = (await downloads.start(MODEL)).id
        await until(downloads, id, is_flowing)
        await downloads.cancel(id)
        assert tree(repository(cache)) == before


# ---- one transfer, whoever asks and watches


async def test_two_who_ask_at_once_get_one_download_and_both_see_its_end(hub: HubServer, cache: Path) -> None:
    async with downloading(hub, cache) as downloads:
        first, second = await asyncio.gather(downloads.start(MODEL), downloads.start(MODEL))
        assert first.id == second.id
        seen = await asyncio.gather(*(ended(downloads, first.id) for _ in range(2)))
        assert [one.state for one in seen] == ["done", "done"]
    assert len(hub.fetched(WEIGHTS)) == 1


async def test_more_than_may_run_wait_for_their_turn(hub: HubServer, cache: Path) -> None:
    hub.add("someone/other", FIXTURE)
    hub.hold = threading.Event()
    async with downloading(hub, cache, at_once=1) as downloads:
        first = await downloads.start(MODEL)
        second = await downloads.start("someone/other")
        await until(downloads, first.id, is_flowing)
        assert downloads.get(second.id).state == "queued"
        await downloads.pause(first.id)  # its place is free then
        await until(downloads, second.id, lambda d: d.state == "downloading")
        assert (await downloads.resume(first.id)).state == "queued"
        hub.hold.set()
        assert (await ended(downloads, second.id)).state == "done"
        assert (await ended(downloads, first.id)).state == "done"


async def test_another_revision_of_what_is_being_fetched_is_a_conflict(hub: HubServer, cache: Path) -> None:
    hub.hold = threading.Event()
    async with downloading(hub, cache) as downloads:
        id = (await downloads.start(MODEL)).id
        with pytest.raises(Conflict, match="in another revision"):
            await downloads.start(MODEL, hub.repos[MODEL].commit)
        hub.hold.set()
        await ended(downloads, id)
        with pytest.raises(Conflict, match="is complete"):
            await downloads.pause(id)


async def test_a_watcher_that_comes_back_is_told_what_it_missed(hub: HubServer, cache: Path) -> None:
    hub.add("someone/other", FIXTURE)
    async with downloading(hub, cache) as downloads:
        start = downloads.changes(None)
        assert (start.is_whole, start.downloads) == (True, ())
        done = await fetched(downloads)
        other = await fetched(downloads, "someone/other")
        missed = downloads.changes(start.position)
        assert (missed.is_whole, {one.id for one in missed.downloads}) == (False, {done.id, other.id})
        await downloads.cancel(done.id)
        later = downloads.changes(missed.position)
        assert (later.is_whole, later.downloads, later.removed) == (False, (), (done.id,))
        nothing = downloads.changes(later.position)
        assert (nothing.downloads, nothing.removed) == ((), ())
        for unknown in ("", "x", "0-0", f"{later.position}9", f"{later.position.partition('-')[0]}-x"):
            assert downloads.changes(unknown).is_whole


async def test_speed_and_time_left_are_told_while_bytes_come(hub: HubServer, cache: Path) -> None:
    hub.bytes_per_s = 1_000_000
    async with downloading(hub, cache) as downloads:
        id = (await downloads.start(MODEL)).id
        now = await until(downloads, id, lambda d: d.speed is not None and d.done_bytes > 500_000)
        assert now.speed is not None
        assert 200_000 < now.speed < 2_000_000
        assert now.eta_s == pytest.approx((now.total_bytes - now.done_bytes) / now.speed)
        assert now.file == "model.safetensors"


# ---- what is refused, and how it is said


async def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(hub: HubServer, cache: Path) -> None:
    hub.token = "hf_secret"
    hub.repos[MODEL].facts["gated"] = "manual"
    async with downloading(hub, cache, token="hf_secret") as downloads:
        await fetched(downloads)
    assert {one.headers.get("authorization") for one in hub.seen if one.origin == "hub"} == {"Bearer hf_secret"}
    assert len(hub.asked("cdn")) == 1
    assert not any("hf_secret" in str(one) for one in hub.asked("cdn"))


@pytest.mark.parametrize(("token", "hint"), [(None, "set HF_TOKEN"), ("hf_other", "with the account of your token")])
async def test_a_gated_model_is_refused_with_what_to_do(hub: HubServer, cache: Path, token: str | None, hint: str) -> None:
    hub.token = "hf_secret"
    hub.repos[MODEL].facts["gated"] = "manual"
    async with downloading(hub, cache, token=token) as downloads:
        with pytest.raises(HubRefused) as refused:
            await downloads.start(MODEL)
        assert f"accept them at {hub.url}/{MODEL}" in refused.value.message
        assert hint in refused.value.message
        assert downloads.all() == ()


async def test_what_is_not_there_is_said_to_be_missing_by_its_field(hub: HubServer, cache: Path) -> None:
    async with downloading(hub, cache) as downloads:
        with pytest.raises(NotFound, match=r"no 'nobody/nothing' on the Hub.*needs a token") as missing:
            await downloads.start("nobody/nothing")
        assert missing.value.param == "model"
        with pytest.raises(NotFound, match="no such revision") as missing:
            await downloads.start(MODEL, "v9")
        assert missing.value.param == "revision"
    async with downloading(hub, cache, token="hf_wrong") as downloads:
        with pytest.raises(NotFound):
            await downloads.start("nobody/nothing")
        hub.repos[MODEL].status = 401
        with pytest.raises(HubRefused, match="look at HF_TOKEN"):
            await downloads.start(MODEL)


async def test_a_hub_that_never_answers_is_given_up(hub: HubServer, cache: Path) -> None:
    hub.silent = {"hub"}
    async with downloading(hub, cache, timeout_s=0.3) as downloads:
        with pytest.raises(HubUnavailable, match="did not answer in time"):
            await downloads.start(MODEL)


async def test_a_hub_that_is_not_there_is_said_to_be(hub: HubServer, cache: Path) -> None:
    hub.url = "http://127.0.0.1:9"
    async with downloading(hub, cache) as downloads:
        with pytest.raises(HubUnavailable, match="no connection to it could be made"):
            await downloads.start(MODEL)


async def test_offline_nobody_is_asked(hub: HubServer, cache: Path) -> None:
    async with downloading(hub, cache, is_offline=True) as downloads:
        with pytest.raises(HubUnavailable, match="HF_HUB_OFFLINE is set") as refused:
            await downloads.start(MODEL)
        assert refused.value.is_offline
    assert hub.seen == []


async def test_what_is_no_name_of_a_model_never_reaches_the_hub(hub: HubServer, cache: Path) -> None:
    names = [
        "",
        "small",
        "a/b/c",
        "../x",
        "a/..",
        "a/b..c",
        "/etc/passwd",
        "a\\b",
        "a/b\n",
        "a%2f..",
        "a/b:c",
        "a b/c",
        "é/x",
        "a/",
        "x" * 300,
    ]
    async with downloading(hub, cache) as downloads:
        for name in names:
            with pytest.raises(InvalidField) as refused:
                await downloads.start(name)
            assert refused.value.param == "model"
        for revision in ("", "..", "a/../b", "/x", "a\\b", "a b"):
            with pytest.raises(InvalidField) as refused:
                await downloads.start(MODEL, revision)
            assert refused.value.param == "revision"
    assert hub.seen == []


HOSTILE = [
    "../evil.json", "a/../../evil.json", "/etc/evil.json", "a//b.json", "./a.json", "a/./b.json", "..", "", "a\\..\\b.json",
    "C:/x.json", "a/\x00.json", "a\n.json", "a/..", "x" * 300 + ".json", "config.json/inner.json", "CONFIG.JSON",
]  # fmt: skip
SENSELESS: list[dict[str, Any]] = [
    {"sha": "../../etc"}, {"sha": "main"}, {"siblings": None}, {"siblings": [{"rfilename": "config.json"}]},
    {"siblings": [{"rfilename": "config.json", "size": 1, "blobId": "../../../evil"}]},
    {"siblings": [{"rfilename": "config.json", "size": -1, "blobId": "0" * 40}]},
]  # fmt: skip


async def test_a_listing_with_a_hostile_name_is_refused_whole(hub: HubServer, cache: Path) -> None:
    async with downloading(hub, cache) as downloads:
        for path in HOSTILE:
            hub.add(MODEL, FIXTURE).files[path] = b"{}"
            with pytest.raises(InvalidField, match="is not downloaded") as refused:
                await downloads.start(MODEL)
            assert refused.value.code == "unusable_model"
    assert paths(cache) == []


async def test_a_description_that_makes_no_sense_is_refused(hub: HubServer, cache: Path) -> None:
    async with downloading(hub, cache) as downloads:
        for changed in SENSELESS:
            hub.repos[MODEL].listing = {"sha": "0" * 40, "siblings": []} | changed
            with pytest.raises(InvalidField, match="is not downloaded"):
                await downloads.start(MODEL)
    assert paths(cache) == []


UNUSABLE = [
    ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "can bring code along ('pytorch_model.bin')"),
    ({"config.json": b"{}", "model.gguf": b"x"}, "GGUF"),
    ({"model.gguf": b"x"}, "GGUF"),
    ({"config.json": b"{}"}, "it has no weights"),
    ({"model.safetensors": b"x"}, "it has no config.json"),
    ({"config.json": b'{"model_type": "llama", "auto_map": {}}', "model.safetensors": b"x"}, "auto_map in config.json"),
    ({"config.json": b'{"model_type": "llama", "model_file": "x.py"}', "model.safetensors": b"x"}, "model_file in config.json"),
    ({"config.json": b"[]", "model.safetensors": b"x"}, "config.json is not an object"),
    ({"config.json": b"{", "model.safetensors": b"x"}, "config.json is not an object"),
    ({"config.json": b'{"model_type": "whisper"}', "model.safetensors": b"x"}, "nothing here runs its architecture ('whisper')"),
]


async def test_what_could_not_be_loaded_is_not_downloaded(hub: HubServer, cache: Path) -> None:
    async with downloading(hub, cache) as downloads:
        for files, reason in UNUSABLE:
            hub.add(MODEL, files)
            with pytest.raises(InvalidField) as refused:
                await downloads.start(MODEL)
            assert reason in refused.value.message
    assert hub.asked("cdn") == []
    assert paths(cache) == []


async def test_a_file_that_is_longer_than_it_should_be_is_not_read_to_its_end(hub: HubServer, cache: Path) -> None:
    described = hub.repos[MODEL].files
    listing = {
        "sha": hub.repos[MODEL].commit,
        "siblings": [
            {
                "rfilename": path,
                "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data) - 9_000_00 if "safe" in path else len(data)},
            }
            for path, data in described.items()
        ],
    }
    hub.repos[MODEL].listing = listing
    async with downloading(hub, cache) as downloads:
        failed = await ended(downloads, (await downloads.start(MODEL)).id)
        assert failed.state == "failed"
    assert find_models([], cache).models == ()


async def test_a_row_that_was_tampered_with_is_forgotten(hub: HubServer, cache: Path) -> None:
    database = Database(cache.parent / "data" / "test.db")
    await database.open()
    files = json.dumps([["../../evil", 1, "0" * 40]])
    row = {"model": MODEL, "revision": "main", "commit": "0" * 40, "state": "downloading", "created_ms": 1}
    for id, wrong in (("a", {"files": files}), ("b", {"files": "{"}), ("c", {"files": "[]", "state": "dreaming"})):
        await DownloadStore(database).put(DownloadRecord(**{"id": id, **row, **wrong}))
    await database.close()
    async with downloading(hub, cache) as downloads:
        assert downloads.all() == ()
    assert hub.seen == []
