"""What went over the wire between a client and the server, as `tests.clients.process` wrote it down."""

import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.e2e.serving import GENEROUS_S, Running

Json = dict[str, Any]


@dataclass(frozen=True)
class Exchange:
    """One request and its whole reply."""

    method: str
    path: str
    headers: dict[str, str]
    request: str
    status: int
    reply_headers: dict[str, str]
    reply: str
    seconds: float

    @cached_property
    def body(self) -> Json:
        return json.loads(self.request) if self.request else {}

    @cached_property
    def events(self) -> list[Json]:
        """A whole reply is its only event."""
        if not self.reply_headers.get("content-type", "").startswith("text/event-stream"):
            return [json.loads(self.reply)] if self.reply[:1] in ("{", "[") else []
        lines = (line.removeprefix("data: ") for line in self.reply.splitlines() if line.startswith("data: "))
        return [json.loads(line) for line in lines if line != "[DONE]"]

    @property
    def ignored(self) -> set[str]:
        return set(filter(None, self.reply_headers.get("x-ignored-fields", "").split(",")))

    @property
    def failure(self) -> str | None:
        """Why this is no reply that the client asked for: its status, or an error inside."""
        if "thread_unsupported_request" in self.reply:
            return None  # what tool runners ask for first; they know this answer and go on without
        if not 200 <= self.status < 300:
            return f"{self.method} {self.path}: {self.status} {self.reply[:2000]}"
        for event in self.events:
            if isinstance(event, dict) and (event.get("error") or event.get("type") in ("error", "response.failed")):
                return f"{self.method} {self.path}: {event}"
        return None

    @property
    def prompt(self) -> tuple[int, int]:
        """Its tokens, and how many of them were computed before, in any protocol's words."""
        found = [u for event in self.events for u in _usages(event)]
        usage = found[-1] if found else {}
        if "prompt_tokens" in usage:
            return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
        if "input_tokens_details" in usage:
            return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]
        read = usage.get("cache_read_input_tokens", 0)
        return usage.get("input_tokens", 0) + read + usage.get("cache_creation_input_tokens", 0), read


def _usages(event: Json) -> list[Json]:
    places = (event, event.get("message"), event.get("response"))
    return [place["usage"] for place in places if isinstance(place, dict) and place.get("usage")]


@dataclass(frozen=True)
class Witness:
    """What has been seen since `begin`, in bytes of the file."""

    server: Running
    path: Path
    begin: int

    def exchanges(self, path: str = "") -> list[Exchange]:
        """Those that ended; the witness writes a little after the client has read the end."""
        self.server.wait_until_idle(GENEROUS_S)
        time.sleep(0.05)
        with self.path.open("rb") as file:
            file.seek(self.begin)
            seen = [Exchange(**json.loads(line)) for line in file]
        return [e for e in seen if e.path.startswith(path) and e.path not in ("/metrics", "/api/status")]

    def failures(self) -> list[str]:
        return [failure for e in self.exchanges() if (failure := e.failure) is not None]
