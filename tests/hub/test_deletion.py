"""What is deleted, and what is not: in real folders and caches."""

import os
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir

from mlx_manager.core.errors import Conflict, NotFound
from mlx_manager.hub.checkpoint import Checkpoint
from mlx_manager.hub.deletion import Places, carry_out, plan
from mlx_manager.hub.local import UnusableModel, find_models
from tests.hub.folders import write_model

OLD, NEW = "0" * 40, "1" * 40


@pytest.fixture
def places(tmp_path: Path) -> Places:
    for name in ("models", "publishers", "cache", "bundled"):
        (tmp_path / name).mkdir()
    return Places((tmp_path / "models", tmp_path / "publishers"), tmp_path / "cache", tmp_path / "bundled")


def found(places: Places, id: str) -> Checkpoint | UnusableModel:
    catalogue = find_models([places.folders[0], places.bundled], places.hub_cache, publishers=places.folders[1])
    model = catalogue.find(id)
    assert model is not None
    return model


def delete(places: Places, id: str, revision: str | None = None) -> None:
    model = found(places, id)
    carry_out(model, places, plan(model, places, revision).confirmation, revision)


def write_repository(cache: Path, *commits: str) -> Path:
    """Revisions that share their weights, and each has a configuration of its own."""
    root = cache / "models--someone--small"
    (root / "blobs").mkdir(parents=True)
    model = write_model(root / "made")
    (model / "model.safetensors").rename(root / "blobs" / "weights")
    for commit in commits:
        (root / "blobs" / f"config-{commit[0]}").write_bytes((model / "config.json").read_bytes())
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").symlink_to(f"../../blobs/config-{commit[0]}")
        (snapshot / "model.safetensors").symlink_to("../../blobs/weights")
    (model / "config.json").unlink()
    model.rmdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commits[-1])
    return root


def test_a_folder_is_deleted_with_the_size_that_was_told(places: Places) -> None:
    folder = write_model(places.folders[0] / "mine")
    other = write_model(places.folders[0] / "other")
    total = sum(file.stat().st_size for file in folder.iterdir())
    told = plan(found(places, "mine"), places)
    assert (told.freed_bytes, told.folder, told.is_link) == (total, folder, False)
    delete(places, "mine")
    assert sorted(path.name for path in places.folders[0].iterdir()) == ["other"]
    assert other.is_dir()


def test_a_model_of_lm_studio_is_deleted_and_its_publisher_stays(places: Places) -> None:
    write_model(places.folders[1] / "someone" / "small")
    write_model(places.folders[1] / "someone" / "other")
    delete(places, "someone/small")
    assert [path.name for path in (places.folders[1] / "someone").iterdir()] == ["other"]


def test_one_that_cannot_be_used_is_deleted_too(places: Places) -> None:
    (places.folders[0] / "empty").mkdir()
    delete(places, "empty")
    assert list(places.folders[0].iterdir()) == []


def test_of_a_link_only_the_link_goes_and_inside_links_are_not_followed(places: Places, tmp_path: Path) -> None:
    elsewhere = write_model(tmp_path / "elsewhere")
    (places.folders[0] / "linked").symlink_to(elsewhere)
    inside = write_model(places.folders[0] / "inside")
    (inside / "more").symlink_to(elsewhere)
    told = plan(found(places, "linked"), places)
    assert (told.is_link, told.freed_bytes) == (True, 0)
    delete(places, "linked")
    delete(places, "inside")
    assert list(places.folders[0].iterdir()) == []
    assert sorted(path.name for path in elsewhere.iterdir()) == ["config.json", "model.safetensors"]


def test_nothing_outside_the_known_folders_is_deleted(places: Places, tmp_path: Path) -> None:
    outside = write_model(tmp_path / "outside" / "small")
    (places.folders[1] / "someone").symlink_to(outside.parent)
    with pytest.raises(Conflict, match="does not lie in a folder of models"):
        plan(found(places, "someone/small"), places)
    with pytest.raises(Conflict, match="does not lie in a folder of models"):
        plan(UnusableModel("models", places.folders[0], "no model"), places)
    assert outside.is_dir()


def test_the_starter_and_adapters_are_not_deleted_and_the_reason_is_told(places: Places) -> None:
    write_model(places.bundled / "starter")
    with pytest.raises(Conflict, match="comes with MLX Manager") as refused:
        plan(found(places, "starter"), places)
    assert refused.value.param == "model"
    with pytest.raises(Conflict, match="adapter"):
        plan(UnusableModel("base:adapter", places.folders[0] / "base", "x"), places)


def test_of_the_cache_all_revisions_go_and_the_official_client_agrees(places: Places) -> None:
    root = write_repository(places.hub_cache, OLD, NEW)
    told = plan(found(places, "someone/small"), places)
    assert told.freed_bytes == sum(path.stat().st_size for path in (root / "blobs").iterdir())
    delete(places, "someone/small")
    assert list(places.hub_cache.iterdir()) == []
    scanned = scan_cache_dir(places.hub_cache)
    assert (scanned.repos, scanned.warnings) == (frozenset(), [])


def test_of_one_revision_what_another_shares_stays(places: Places) -> None:
    root = write_repository(places.hub_cache, OLD, NEW)
    told = plan(found(places, "someone/small"), places, NEW)
    assert told.freed_bytes == (root / "blobs" / "config-1").stat().st_size
    delete(places, "someone/small", NEW)
    assert sorted(path.name for path in (root / "blobs").iterdir()) == ["config-0", "weights"]
    left = found(places, "someone/small")
    assert isinstance(left, Checkpoint)
    assert left.path.name == OLD
    with pytest.raises(NotFound, match=f"There is: {OLD}") as refused:
        plan(left, places, "2" * 40)
    assert refused.value.param == "revision"


def test_a_link_of_the_cache_that_leads_out_is_not_followed(places: Places, tmp_path: Path) -> None:
    victim = tmp_path / "victim.json"
    victim.write_text("{}")
    root = write_repository(places.hub_cache, OLD, NEW)
    (root / "snapshots" / NEW / "extra.json").symlink_to(victim)
    with pytest.raises(Conflict, match="leads out of it"):
        plan(found(places, "someone/small"), places, NEW)
    delete(places, "someone/small")  # the whole folder goes, and its links as links
    assert victim.exists()


def test_a_repository_that_is_a_link_is_not_deleted(places: Places, tmp_path: Path) -> None:
    root = write_repository(tmp_path / "elsewhere", OLD)
    (places.hub_cache / root.name).symlink_to(root)
    with pytest.raises(Conflict, match="is a link"):
        plan(found(places, "someone/small"), places)
    assert root.is_dir()


def test_what_was_confirmed_is_what_goes(places: Places) -> None:
    folder = write_model(places.folders[0] / "mine")
    model = found(places, "mine")
    told = plan(model, places)
    (folder / "more.txt").write_text("new")
    with pytest.raises(Conflict, match="something else than what was confirmed") as refused:
        carry_out(model, places, told.confirmation)
    assert (refused.value.param, refused.value.code) == ("confirmation", "confirmation_outdated")
    assert folder.is_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may delete everything")
def test_what_may_not_be_deleted_is_said_to_be(places: Places) -> None:
    write_model(places.folders[0] / "mine")
    places.folders[0].chmod(0o500)
    try:
        with pytest.raises(Conflict, match="could not be deleted: Permission denied"):
            delete(places, "mine")
    finally:
        places.folders[0].chmod(0o700)
