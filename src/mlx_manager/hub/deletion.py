"""Models are deleted from this machine: what goes is worked out first and told, and nothing else goes.

Only from the folders that are known, never through a link that leads out of them, and of the cache never a blob that another
revision needs.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import DeleteCacheStrategy, scan_cache_dir

from mlx_manager.config import BUNDLED_MODELS, Config
from mlx_manager.core.errors import Conflict, NotFound
from mlx_manager.hub.checkpoint import Checkpoint
from mlx_manager.hub.local import UnusableModel, hub_cache_folder


@dataclass(frozen=True, slots=True)
class Deletion:
    """What deleting a model would do. `freed_bytes` come free; `is_link`: only a link goes, and what it leads to stays. `confirmation`
    stands for exactly this: it is another one as soon as something else would go."""

    id: str
    folder: Path
    freed_bytes: int
    num_files: int
    is_link: bool
    confirmation: str


@dataclass(frozen=True, slots=True)
class Places:
    """Where models may be deleted from: `folders`, and Hugging Face's cache. What is below `bundled` belongs to the program."""

    folders: Sequence[Path]
    hub_cache: Path
    bundled: Path

    @classmethod
    def of(cls, config: Config) -> "Places":
        publishers = () if config.publishers is None else (config.publishers,)
        return cls((*config.models_dir, *publishers), hub_cache_folder(), BUNDLED_MODELS)


def plan(model: Checkpoint | UnusableModel, places: Places, revision: str | None = None) -> Deletion:
    """Of a model in the cache all its revisions go, or the one that is named by its commit. Blocking. Raises `Conflict` for what is not
    deleted, with the reason, and `NotFound` for a revision that is not here."""
    if ":" in model.id:
        raise Conflict(f"'{model.id}' is a model with an adapter on it: only the model itself is deleted here.", param="model")
    if model.path.is_relative_to(places.bundled):
        raise Conflict(f"'{model.id}' comes with MLX Manager, which would miss it: it is not deleted.", param="model")
    if model.path.is_relative_to(places.hub_cache):
        strategy = _strategy(model, places.hub_cache, revision)
        gone = [*strategy.repos, *strategy.snapshots, *strategy.refs, *strategy.blobs]
        folder = places.hub_cache / model.path.relative_to(places.hub_cache).parts[0]
        return _deletion(model.id, folder, strategy.expected_freed_size, gone, is_link=False)
    if revision is not None:
        raise NotFound(f"'{model.id}' has no revisions: it is a folder of its own.", param="revision")
    if not any(_is_below(model.path, folder) for folder in places.folders):
        raise Conflict(f"'{model.id}' does not lie in a folder of models: it is not deleted.", param="model")
    if model.path.is_symlink():
        return _deletion(model.id, model.path, 0, [model.path], is_link=True)
    files = [Path(folder) / name for folder, _, names in os.walk(model.path) for name in names]
    return _deletion(model.id, model.path, sum(file.lstat().st_size for file in files), [model.path, *files], is_link=False)


def carry_out(model: Checkpoint | UnusableModel, places: Places, confirmation: str, revision: str | None = None) -> Deletion:
    """What was told under that confirmation. Blocking. Raises what `plan` does, and `Conflict` if something else would go now or if it
    cannot be done."""
    wanted = plan(model, places, revision)
    if wanted.confirmation != confirmation:
        raise Conflict(
            f"Deleting '{model.id}' would remove something else than what was confirmed: look again what it would.",
            param="confirmation",
            code="confirmation_outdated",
        )
    try:
        _remove(model, places, wanted, revision)
    except OSError as error:
        raise Conflict(f"'{model.id}' could not be deleted: {error.strerror}.", param="model") from error
    return wanted


def _remove(model: Checkpoint | UnusableModel, places: Places, wanted: Deletion, revision: str | None) -> None:
    if wanted.is_link:
        model.path.unlink()
    elif model.path.is_relative_to(places.hub_cache):
        strategy = _strategy(model, places.hub_cache, revision)
        strategy.execute()
        if left := [path for path in (*strategy.repos, *strategy.snapshots, *strategy.blobs) if os.path.lexists(path)]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(left[0]))
    else:
        leaving = model.path.with_name(f".{model.path.name}.{wanted.confirmation}.deleted")  # in one step it is no model any more
        model.path.rename(leaving)
        shutil.rmtree(leaving)


def _strategy(model: Checkpoint | UnusableModel, hub_cache: Path, revision: str | None) -> DeleteCacheStrategy:
    """That of Hugging Face's own tools. Raises `Conflict` where it would reach out of the model's folder."""
    cache = hub_cache.resolve()
    folder = cache / model.path.relative_to(hub_cache).parts[0]
    found = scan_cache_dir(cache)
    repo = next((repo for repo in found.repos if repo.repo_path == folder), None)
    if repo is None or folder.is_symlink():
        reason = "is a link" if folder.is_symlink() else "is not as Hugging Face's tools leave it"
        raise Conflict(f"The folder of '{model.id}' in the cache {reason}: it is not deleted.", param="model")
    commits = {one.commit_hash for one in repo.revisions}
    if revision is not None and revision not in commits:
        there = ", ".join(sorted(commits))
        raise NotFound(f"'{model.id}' is not here in the revision '{revision[:100]}'. There is: {there}.", param="revision")
    strategy = found.delete_revisions(*(commits if revision is None else [revision]))
    for path in (*strategy.repos, *strategy.snapshots, *strategy.refs, *strategy.blobs):
        if not path.is_relative_to(folder):
            raise Conflict(f"A link in the folder of '{model.id}' leads out of it: it is not deleted.", param="model")
    return strategy


def _is_below(path: Path, folder: Path) -> bool:
    """Whether the folder that a path's own entry stands in is really one of those below another."""
    return path.parent.resolve().is_relative_to(folder.resolve()) and path != folder


def _deletion(id: str, folder: Path, freed_bytes: int, gone: Sequence[Path], *, is_link: bool) -> Deletion:
    told = "\0".join([str(freed_bytes), *sorted(map(str, gone))])
    return Deletion(id, folder, freed_bytes, len(gone), is_link, hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:16])
