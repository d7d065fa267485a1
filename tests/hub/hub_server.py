"""A Hub on loopback, and the CDN that it redirects to as another origin: over real sockets, as the real one answers, and with its bad days.

What it does wrong is set on it; what came to it is in `seen`.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SIGNATURE = "sig=signed-for-this-request"
CHUNK = 16_384


@dataclass
class Repo:
    files: dict[str, bytes]
    facts: dict[str, Any] = field(default_factory=dict)
    """What lists say of it: downloads, likes, lastModified, gated, tags."""
    status: int = 200
    """For everything about it, with `code`."""
    code: str | None = None
    listing: Any = None
    """In place of the true one."""

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr([(path, _etag(path, data)) for path, data in sorted(self.files.items())]).encode()).hexdigest()


@dataclass(frozen=True)
class Seen:
    """`origin` is hub or cdn; headers by their names in small letters."""

    origin: str
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]

    @property
    def start(self) -> int | None:
        """The byte that a range begins with."""
        found = self.headers.get("range")
        return None if found is None else int(found.removeprefix("bytes=").partition("-")[0])


@dataclass
class HubServer:
    repos: dict[str, Repo] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    url: str = ""
    cdn_url: str = ""
    token: str | None = None
    """Gated repositories want it."""
    silent: set[str] = field(default_factory=set)
    """Origins that never answer."""
    bytes_per_s: int | None = None
    """Of each answer of the CDN."""
    cuts: list[int] = field(default_factory=list)
    """After so many bytes the next answers of the CDN break off."""
    ignores_ranges: bool = False
    ignores_if_range: bool = False
    version: str = "v1"
    """Of what the CDN calls its files' versions."""
    corrupts: set[str] = field(default_factory=set)
    """Files that come with another byte than they should."""
    statuses: list[tuple[str, int, dict[str, str]]] = field(default_factory=list)
    """(origin, status, headers) of the next answers of that origin."""
    hold: threading.Event | None = None
    """The CDN's bodies stop after one chunk until it is set."""
    closing: threading.Event = field(default_factory=threading.Event)

    def add(self, repo: str, files: Mapping[str, bytes] | Path, **facts: Any) -> Repo:
        """A model's files, or those of its folder."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in sorted(files.rglob("*")) if path.is_file()}
        self.repos[repo] = Repo(dict(files), facts)
        return self.repos[repo]

    def asked(self, origin: str, ending: str = "", method: str = "GET") -> list[Seen]:
        return [one for one in self.seen if one.origin == origin and one.path.endswith(ending) and one.method == method]

    def fetched(self, data: bytes) -> list[Seen]:
        """The CDN's requests for a content."""
        return self.asked("cdn", hashlib.sha256(data).hexdigest())


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def _etag(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _is_large(path) else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    origin = "hub"
    hub: HubServer

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.origin, self.command, unquote(parts.path), parse_qs(parts.query), headers)
        self.hub.seen.append(seen)
        if self.origin in self.hub.silent:
            self.hub.closing.wait(60)
            return
        for i, (origin, status, more) in enumerate(self.hub.statuses):
            if origin == self.origin:
                del self.hub.statuses[i]
                self._answer(status, b"", more)
                return
        try:
            self._cdn(seen) if self.origin == "cdn" else self._route(seen)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._answer(200, json.dumps(value).encode(), {"content-type": "application/json", **(headers or {})})

    def _route(self, seen: Seen) -> None:
        if seen.path == "/api/models":
            self._list(seen)
            return
        parts = seen.path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            name, rest = "/".join(parts[2:4]), parts[4:]
        elif len(parts) >= 5 and parts[2] == "resolve":
            name, rest = "/".join(parts[:2]), parts[2:]
        else:
            self._answer(404, b"")
            return
        repo = self.hub.repos.get(name)
        if repo is None:
            self._refuse(401 if "authorization" not in seen.headers else 404, "RepoNotFound")
        elif repo.status != 200:
            self._refuse(repo.status, repo.code)
        elif repo.facts.get("gated") and rest[:1] == ["resolve"] and seen.headers.get("authorization") != f"Bearer {self.hub.token}":
            self._refuse(401 if "authorization" not in seen.headers else 403, "GatedRepo")
        elif rest[:1] == ["resolve"]:
            self._resolve(repo, "/".join(rest[2:]))
        elif rest[1:2] not in ([], ["main"], [repo.commit]):
            self._refuse(404, "RevisionNotFound")
        elif rest[:1] == ["tree"]:
            self._json([{"type": "file", "path": p, "size": len(d), "oid": _git(d), **_lfs(p, d, "oid")} for p, d in repo.files.items()])
        else:
            self._json(repo.listing or self._describe(name, repo, blobs=seen.query.get("blobs") == ["true"]))

    def _refuse(self, status: int, code: str | None) -> None:
        self._answer(status, b'{"error":"no"}', {"x-error-code": code} if code else {})

    def _describe(self, name: str, repo: Repo, *, blobs: bool) -> dict[str, Any]:
        siblings = [
            {"rfilename": p} | ({"size": len(d), "blobId": _git(d), **_lfs(p, d, "sha256")} if blobs else {}) for p, d in repo.files.items()
        ]
        return {"id": name, "modelId": name, "sha": repo.commit, "tags": [], "siblings": siblings, **repo.facts}

    def _list(self, seen: Seen) -> None:
        def one(name: str) -> str:
            return seen.query.get(name, [""])[0]

        found = []
        for name, repo in self.hub.repos.items():
            described = self._describe(name, repo, blobs=False)
            tags = set(described["tags"])
            is_meant = one("search").lower() in name.lower() and one("author") in ("", name.partition("/")[0])
            if is_meant and set(seen.query.get("filter", [])) <= tags:
                found.append(described | {"siblings": None})
        if one("sort"):
            found.sort(key=lambda model: model.get(one("sort")) or 0, reverse=True)
        start, limit = int(one("cursor") or 0), int(one("limit") or 1000)
        more = {}
        if start + limit < len(found):
            query = self.path.partition("?")[2].replace(f"&cursor={start}", "")
            more = {"link": f'<{self.hub.url}/api/models?{query}&cursor={start + limit}>; rel="next"'}
        self._json(found[start : start + limit], more)

    def _resolve(self, repo: Repo, path: str) -> None:
        data = repo.files.get(path)
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        headers = {"x-repo-commit": repo.commit, "etag": f'"{_etag(path, data)}"', "accept-ranges": "bytes"}
        if _is_large(path):
            digest = hashlib.sha256(data).hexdigest()
            headers |= {"x-linked-etag": f'"{digest}"', "x-linked-size": str(len(data))}
            headers |= {"location": f"{self.hub.cdn_url}/{path}/{digest}?{SIGNATURE}"}
            self._answer(302, b"", headers)
        else:
            self._send(data, headers, path)

    def _cdn(self, seen: Seen) -> None:
        path, _, digest = seen.path.strip("/").rpartition("/")
        found = (d for repo in self.hub.repos.values() for p, d in repo.files.items() if _is_large(p) and _etag(p, d) == digest)
        data = next(found, None)
        if data is None or seen.query.get("sig") != [SIGNATURE.removeprefix("sig=")]:
            self._answer(403, b"")
            return
        self._send(data, {"etag": f'"{digest[:8]}-{self.hub.version}"', "accept-ranges": "bytes"}, path)

    def _send(self, data: bytes, headers: Mapping[str, str], path: str) -> None:
        hub, status, start, end = self.hub, 200, 0, len(data)
        if path in hub.corrupts:
            data = data[:-1] + bytes([data[-1] ^ 1])
        asked = self.headers.get("range")
        condition = self.headers.get("if-range")
        if asked and not hub.ignores_ranges and (condition in (None, headers["etag"]) or hub.ignores_if_range):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, len(data)) if last else len(data)
            if start >= len(data):
                self._answer(416, b"", {"content-range": f"bytes */{len(data)}"})
                return
            status, headers = 206, {**headers, "content-range": f"bytes {start}-{end - 1}/{len(data)}"}
        self.send_response(status)
        for name, value in {"content-length": str(end - start), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = hub.cuts.pop(0) if hub.cuts and self.origin == "cdn" else None
        position = start
        while position < end:
            size = min(CHUNK, end - position, *([] if cut is None else [start + cut - position]))
            if size <= 0:
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(data[position : position + size])
            position += size
            if self.origin == "cdn":
                if hub.hold is not None:
                    hub.hold.wait(30)
                if hub.bytes_per_s is not None:
                    time.sleep(size / hub.bytes_per_s)


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _lfs(path: str, data: bytes, name: str) -> dict[str, Any]:
    return {"lfs": {name: hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}} if _is_large(path) else {}


@contextmanager
def serving_hub(token: str | None = None) -> Iterator[HubServer]:
    hub = HubServer(token=token)
    servers = []
    for origin in ("hub", "cdn"):
        handler = type(f"{origin.title()}Handler", (_Handler,), {"origin": origin, "hub": hub})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name=origin)
        thread.start()
        servers.append((server, thread))
    (hub_server, _), (cdn_server, _) = servers
    hub.url = f"http://127.0.0.1:{hub_server.server_address[1]}"
    hub.cdn_url = f"http://127.0.0.1:{cdn_server.server_address[1]}"
    try:
        yield hub
    finally:
        hub.closing.set()
        if hub.hold is not None:
            hub.hold.set()
        for server, thread in servers:
            server.shutdown()
            server.server_close()
            thread.join()
