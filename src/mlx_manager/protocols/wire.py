"""What all protocols have in common: a request that was read, what can go wrong with it, and who writes the reply."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from mlx_manager.core.events import Event, Reply
from mlx_manager.core.requests import GenerationRequest, ReasoningOption

Json = dict[str, Any]


def without_absent(fields: Json) -> Json:
    """What is None was not said."""
    return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """`request` is for the gateway; the rest is how the reply is to be written. `ignored` are fields without effect; `reasoning_fields`
    says which fields an option came from, should it turn out to have none."""

    request: GenerationRequest
    stream: bool
    ignored: tuple[str, ...]
    reasoning_fields: Mapping[ReasoningOption, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))

    def without_effect(self, unused: tuple[ReasoningOption, ...]) -> tuple[str, ...]:
        """All fields without effect, now that the model has said which options it has no use for."""
        return tuple(dict.fromkeys((*self.ignored, *(name for option in unused for name in self.reasoning_fields.get(option, ())))))


@dataclass(frozen=True, slots=True)
class Failure:
    """An error in OpenAI's words (`type_`, `code`); the other protocols' follow from the status. `retry` False: the same request fails
    again; None leaves it to the client."""

    status: int
    type_: str
    code: str | None
    message: str
    param: str | None = None
    retry: bool | None = None
    retry_after_s: int | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """One server-sent event: a JSON object or a bare word, under a name or none. Without data it is a comment."""

    data: Json | str | None = None
    event: str | None = None


DONE = Frame("[DONE]")
KEEP_ALIVE = Frame()


class Writer(Protocol):
    """Of one reply."""

    def whole(self, reply: Reply) -> Json:
        """The body of a reply that is not streamed."""
        ...

    def frames(self, event: Event) -> list[Frame]:
        """What an event puts on the wire, in order; `Finished` brings what ends the stream."""
        ...

    def failed(self, failure: Failure) -> list[Frame]:
        """What ends a stream that cannot go on; nothing may have been written before it."""
        ...

    def keep_alive(self) -> Frame:
        """What says that the reply is still being made."""
        ...
