"""What was said in a conversation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Image:
    """A picture as the client sent it, not decoded yet. `where` is the field it came in, for who finds something wrong with it."""

    data: bytes
    where: str = field(default="messages", compare=False)


@dataclass(frozen=True, slots=True)
class Video:
    """A clip as the client sent it, not decoded yet, of which `num_frames` are to be looked at, or all if it has fewer."""

    data: bytes
    num_frames: int
    where: str = field(default="messages", compare=False)


@dataclass(frozen=True, slots=True)
class RemoteImage:
    """A picture that the client only named. The gateway fetches it, or refuses it, before a model sees the request."""

    url: str
    where: str = field(default="messages", compare=False)


@dataclass(frozen=True, slots=True)
class Document:
    """A PDF as the client sent it, not read yet. The gateway puts its text in its place before a model sees the request."""

    data: bytes
    where: str = field(default="messages", compare=False)


Media = Image | Video | RemoteImage
Part = str | Media | Document
# Text; or, where there is something to look at or to read, text and that in their order.
Content = str | tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant made. `arguments` is JSON text as the client or the model wrote it; it may be broken."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. A tool's result has `tool_call_id`; only an assistant has `reasoning` and `tool_calls`."""

    role: Role
    content: Content
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """What is said, without what is shown."""
        return self.content if isinstance(self.content, str) else "".join(part for part in self.content if isinstance(part, str))

    @property
    def media(self) -> tuple[Media, ...]:
        """What is shown."""
        return () if isinstance(self.content, str) else tuple(part for part in self.content if not isinstance(part, str | Document))


def content_of(parts: Sequence[Part]) -> Content:
    """Parts as they came, in the one form that each content has: text alone is one string."""
    if all(isinstance(part, str) for part in parts):
        return "".join(part for part in parts if isinstance(part, str))
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return tuple(joined)
