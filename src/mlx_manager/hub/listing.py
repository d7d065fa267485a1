"""What a repository on the Hub holds, and which of it is fetched. Pure: the listing is somebody else's, and nothing in it is trusted."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast

from mlx_manager.hub.checkpoint import Unusable, no_config, no_weights

ALLOWED = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Endings of what is fetched; the last two are tokenizers'."""
MAX_FILES = 10_000
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    path: str
    """Relative, with slashes."""
    size: int
    """Bytes."""
    etag: str
    """Names its content: SHA-256 of a large file, the git blob's SHA-1 of a small one. Also the name of its blob in the cache."""


@dataclass(frozen=True, slots=True)
class Listing:
    commit: str
    files: tuple[RemoteFile, ...]

    def get(self, path: str) -> RemoteFile | None:
        return next((file for file in self.files if file.path == path), None)


def read_listing(told: object) -> Listing:
    """From the Hub's description of a revision, with `blobs=true`. Raises Unusable for one that is not plainly a list of files."""
    match told:
        case {"sha": str(commit), "siblings": list()} if _COMMIT.fullmatch(commit):
            siblings = cast(list[object], cast(dict[str, Any], told)["siblings"])
        case _:
            raise Unusable("the Hub's list of its files makes no sense")
    if len(siblings) > MAX_FILES:
        raise Unusable(f"it has more than {MAX_FILES:,} files")
    files = tuple(_file(sibling) for sibling in siblings)
    _check_places([file.path for file in files])
    return Listing(commit, files)


def _file(sibling: object) -> RemoteFile:
    match sibling:
        case {"rfilename": str(path), "lfs": {"sha256": str(etag), "size": int(size)}}:
            pass
        case {"rfilename": str(path), "blobId": str(etag), "size": int(size)}:
            pass
        case _:
            raise Unusable("the Hub's list of its files makes no sense")
    if not is_inside(path):
        raise Unusable(f"a file of it would lie outside its folder ({path[:100]!r})")
    if not _ETAG.fullmatch(etag) or size < 0:
        raise Unusable(f"the Hub does not say what {path[:100]!r} holds")
    return RemoteFile(path, size, etag)


def is_inside(path: str) -> bool:
    """Whether a path of somebody else's leads nowhere but into the folder that it is put under, on any system."""
    parts = path.split("/")
    return (
        not any(part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > 255 for part in parts)
        and _CONTROL.search(path) is None
        and re.match(r"[A-Za-z]:", path) is None
        and path.isprintable()
        and len(path) <= 1024
    )


def _check_places(paths: Iterable[str]) -> None:
    """No name twice, in whatever spelling a disk takes for the same, and none both a file and a folder."""
    folders: set[str] = set()
    names: set[str] = set()
    for path in paths:
        name = path.casefold()
        if name in names:
            raise Unusable(f"it has {path[:100]!r} twice")
        names.add(name)
        folders |= {str(parent) for parent in PurePosixPath(name).parents}
    if clash := sorted(names & folders):
        raise Unusable(f"{clash[0][:100]!r} is both a file and a folder of it")


def wanted(listing: Listing) -> tuple[RemoteFile, ...]:
    """What is fetched of a model, small files first. Raises Unusable for one that could not be loaded, before a byte of it is here."""
    allowed = [file for file in listing.files if file.path.endswith(ALLOWED) and not any(p.startswith(".") for p in file.path.split("/"))]
    if listing.get("config.json") is None:
        raise Unusable(no_config(file.path for file in listing.files))
    if not any(is_weights(file.path) and "/" not in file.path for file in allowed):
        raise Unusable(no_weights(file.path for file in listing.files))
    # Other arrays repeat the same weights for other programs.
    chosen = [file for file in allowed if not file.path.endswith(".safetensors") or is_weights(file.path)]
    return tuple(sorted(chosen, key=lambda file: (file.path.endswith(".safetensors"), file.path)))


def is_weights(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.startswith("model") and name.endswith(".safetensors")


def weight_bytes(files: Iterable[RemoteFile]) -> int:
    return sum(file.size for file in files if is_weights(file.path))


def dump(files: Iterable[RemoteFile]) -> list[list[Any]]:
    """As JSON keeps it."""
    return [[file.path, file.size, file.etag] for file in files]


def load(kept: object) -> tuple[RemoteFile, ...]:
    """What `dump` made. Raises Unusable, since a database can be edited by hand."""
    rows = cast(list[object], kept) if isinstance(kept, list) else []
    files: list[Mapping[str, object]] = []
    for row in rows:
        match row:
            case [str(path), int(size), str(etag)]:
                files.append({"rfilename": path, "size": size, "blobId": etag})
            case _:
                raise Unusable("what was kept of it makes no sense")
    return tuple(_file(file) for file in files)
