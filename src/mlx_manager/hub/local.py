"""Which models lie on this machine: in the operator's folders and in the Hugging Face cache."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from mlx_manager.hub.checkpoint import Checkpoint, Unusable, read


@dataclass(frozen=True, slots=True)
class UnusableModel:
    id: str
    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What was found, each part sorted by id. An id is in it once."""

    models: tuple[Checkpoint, ...]
    unusable: tuple[UnusableModel, ...]

    def get(self, id: str) -> Checkpoint | None:
        return next((model for model in self.models if model.id == id), None)


def hub_cache_folder() -> Path:
    """Where Hugging Face tools keep downloads; HF_HUB_CACHE and HF_HOME move it. It need not exist."""
    return Path(constants.HF_HUB_CACHE)


def find_models(folders: Sequence[Path], hub_cache: Path | None) -> Catalogue:
    """Every direct subfolder of a folder is a model of that name; the cache's are `organisation/name`.

    The first folder with an id has it, and the cache comes last. One bad folder never hides the others: it is listed with its
    reason. A link to a model elsewhere is followed, since only the operator can have put it there.
    """
    models: dict[str, Checkpoint] = {}
    unusable: dict[str, UnusableModel] = {}
    for id, candidates in _candidates(folders, hub_cache):
        if id in models or id in unusable:
            continue
        found = _first_usable(id, candidates)
        if isinstance(found, Checkpoint):
            models[id] = found
        else:
            unusable[id] = found
    return Catalogue(tuple(models[id] for id in sorted(models)), tuple(unusable[id] for id in sorted(unusable)))


def _first_usable(id: str, candidates: Sequence[Path]) -> Checkpoint | UnusableModel:
    """If none is usable, the reason is the likeliest one's."""
    refusals: list[UnusableModel] = []
    for path in candidates:
        try:
            return read(path, id)
        except Unusable as error:
            refusals.append(UnusableModel(id, path, error.reason))
    return refusals[0]


def _candidates(folders: Sequence[Path], hub_cache: Path | None) -> Iterator[tuple[str, list[Path]]]:
    """Ids and the folders that may hold them (at least one), the likeliest first."""
    for folder in folders:
        for path in _subfolders(folder):
            yield path.name, [path]
    for path in _subfolders(hub_cache) if hub_cache is not None else []:
        if (name := re.fullmatch(r"models--(.+)", path.name)) and (snapshots := _snapshots(path)):
            yield name[1].replace("--", "/"), snapshots


def _subfolders(folder: Path) -> list[Path]:
    """Hidden ones are no models: tools keep their own things there. A folder that cannot be read has none."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [folder / name for name in names if not name.startswith(".") and os.path.isdir(folder / name)]


def _snapshots(repository: Path) -> list[Path]:
    """A repository's downloads in the order to try them: what `main` points at, then the newest."""
    try:
        main = (repository / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        main = None
    snapshots = _subfolders(repository / "snapshots")
    try:
        return sorted(snapshots, key=lambda path: (path.name == main, path.stat().st_mtime), reverse=True)
    except OSError:  # one was deleted meanwhile
        return []
