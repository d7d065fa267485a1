"""Which models lie on this machine, in the operator's folders, LM Studio's and the Hugging Face cache, and which adapters for them."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from mlx_manager.config import Config
from mlx_manager.hub.adapters import check_fit, read_adapter
from mlx_manager.hub.checkpoint import Adapter, Checkpoint, Unusable, chat_template, layer_shapes, read, read_json

ADAPTERS = "adapters"
"""The folder of a model's own adapters."""


ShapesOf = Callable[[Path], Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class UnusableModel:
    """Of an adapter the id is `base:adapter`, or `*:adapter` if it is of no model in particular."""

    id: str
    path: Path
    reason: str
    is_adapter: bool = False


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What was found, each part sorted by id. An id is in it once."""

    models: tuple[Checkpoint, ...]
    unusable: tuple[UnusableModel, ...]

    def get(self, id: str) -> Checkpoint | None:
        return next((model for model in self.models if model.id == id), None)

    def find(self, id: str) -> Checkpoint | UnusableModel | None:
        """Also one that cannot be used."""
        return self.get(id) or next((broken for broken in self.unusable if broken.id == id), None)


def hub_cache_folder() -> Path:
    """Where Hugging Face tools keep downloads; HF_HUB_CACHE and HF_HOME move it. It need not exist."""
    return Path(constants.HF_HUB_CACHE)


def all_models(config: Config) -> Catalogue:
    """Every model on this machine."""
    return find_models(config.model_folders, hub_cache_folder(), config.adapters_dir, config.publishers)


def read_templates(path: Path) -> tuple[dict[str, Any], str]:
    """The configuration of a model's folder, and its chat templates; empty where they cannot be read."""
    try:
        jinja = path / "chat_template.jinja"
        template = jinja.read_text(encoding="utf-8", errors="replace") if jinja.is_file() else None
        return read_json(path / "config.json") or {}, chat_template(template, read_json(path / "tokenizer_config.json") or {})
    except (OSError, Unusable):
        return {}, ""


def find_models(
    folders: Sequence[Path], hub_cache: Path | None, adapter_folders: Sequence[Path] = (), publishers: Path | None = None
) -> Catalogue:
    """Every direct subfolder of a folder is a model of that name; those of `publishers` (LM Studio's folder) are one level down and, like
    the cache's, `organisation/name`. Beside them stand their adapters: what is in their folder `adapters`, and the subfolders of
    `adapter_folders` that fit.

    The first folder with an id has it, and the cache comes last. One bad folder never hides the others: it is listed with its
    reason. A link to a model elsewhere is followed, since only the operator can have put it there.
    """
    models: dict[str, Checkpoint] = {}
    unusable: dict[str, UnusableModel] = {}
    for id, candidates in _candidates(folders, publishers, hub_cache):
        if id in models or id in unusable:
            continue
        found = _first_usable(id, candidates)
        if isinstance(found, Checkpoint):
            models[id] = found
        else:
            unusable[id] = found
    for found in list(_adapted(list(models.values()), adapter_folders)):
        if isinstance(found, Checkpoint):
            models.setdefault(found.id, found)
        else:
            unusable.setdefault(found.id, found)
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


def _adapted(models: Sequence[Checkpoint], folders: Sequence[Path]) -> Iterator[Checkpoint | UnusableModel]:
    """Models with an adapter on top, the likeliest of an id first. No link may lead out of the folder that is looked at: an adapter is
    often somebody else's, and requests can ask for it."""
    shapes_of = cache(layer_shapes)  # each model's headers are read once, and not at all if there are no adapters
    for base in models:
        for path in _subfolders(base.path / ADAPTERS):
            yield from _judged(f"{base.id}:{path.name}", path, _root(base.path), [base], shapes_of)
    for folder in folders:
        for path in _subfolders(folder):
            yield from _judged(f"*:{path.name}", path, folder, models, shapes_of)


def _judged(id: str, path: Path, root: Path, bases: Sequence[Checkpoint], shapes_of: ShapesOf) -> Iterator[Checkpoint | UnusableModel]:
    """An adapter on each of the bases that it fits, or on none; if it names one of them, on no other."""
    try:
        adapter = read_adapter(path, root)
    except Unusable as error:
        yield UnusableModel(id, path, error.reason, is_adapter=True)
        return
    named = [base for base in bases if _last_part(base.id) == _last_part(adapter.base or "")]
    reasons: list[str] = []
    num_found = 0
    for base in named or [base for base in bases if base.kind == "text"] or bases:
        try:
            check_fit(adapter, base, shapes_of)
        except Unusable as error:
            reasons.append(error.reason)
        else:
            num_found += 1
            yield _with(base, adapter)
    if num_found == 0:
        reason = reasons[0] if len(reasons) == 1 else "it fits none of the models here" + "".join(f" ({why})" for why in reasons[:1])
        yield UnusableModel(id, path, reason, is_adapter=True)


def _last_part(name: str) -> str:
    """Of `organisation/name`, or of a path."""
    return name.rstrip("/").rpartition("/")[2].lower()


def _with(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    return replace(
        base,
        id=f"{base.id}:{adapter.name}",
        size_bytes=base.size_bytes + adapter.size_bytes,
        num_parameters=base.num_parameters + adapter.num_parameters,
        created=adapter.created,
        adapter=adapter,
    )


def _root(path: Path) -> Path:
    """Where the files of a model may lie: in its folder or, for one of the cache, in its repository, which links to its blobs."""
    return path.parents[1] if path.parent.name == "snapshots" else path


def _candidates(folders: Sequence[Path], publishers: Path | None, hub_cache: Path | None) -> Iterator[tuple[str, list[Path]]]:
    """Ids and the folders that may hold them (at least one), the likeliest first."""
    for folder in folders:
        for path in _subfolders(folder):
            yield path.name, [path]
    for publisher in _subfolders(publishers) if publishers is not None else []:
        for path in _subfolders(publisher):
            yield f"{publisher.name}/{path.name}", [path]
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
