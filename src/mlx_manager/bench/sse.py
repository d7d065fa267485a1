"""Bytes of a server-sent event stream to events, however the bytes were cut. Knows nothing about chat."""

from dataclasses import dataclass

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One dispatched event. `name` is "message" where the server gave none."""

    name: str
    data: str


class SseParser:
    """Feed bytes, get the events that they complete. Owner of the half line and the half event between two feeds.

    Lines end in CR, LF or CRLF, mixed at will. A line is decoded only when it is whole, so a character cut in two by the
    network is never seen; bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._after_cr = False
        self._first_line = True
        self._name = ""
        self._data: list[str] = []

    def feed(self, data: bytes) -> list[ServerEvent]:
        if not data:
            return []
        if self._after_cr and data.startswith(b"\n"):  # the other half of a CRLF whose CR has already ended its line
            data = data[1:]
        self._after_cr = False
        lines = (self._rest + data).splitlines(keepends=True)  # of bytes: only CR, LF and CRLF
        self._rest = b""
        if lines and not lines[-1].endswith((b"\r", b"\n")):
            self._rest = lines.pop()
        elif lines:
            self._after_cr = lines[-1].endswith(b"\r")
        return [event for line in lines if (event := self._line(line.rstrip(b"\r\n"))) is not None]

    def finish(self) -> list[ServerEvent]:
        """The event whose lines are whole but whose closing blank line never came. A half line is a cut, and is dropped."""
        event = self._dispatch()
        return [] if event is None else [event]

    def _line(self, line: bytes) -> ServerEvent | None:
        if self._first_line:
            self._first_line = False
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line:
            return self._dispatch()
        name, _, value = line.decode("utf-8", errors="replace").partition(":")
        value = value.removeprefix(" ")
        match name:
            case "data":
                self._data.append(value)
            case "event":
                self._name = value
            case _:  # a comment (empty name), `id`, `retry`, or a field nobody defined: nothing to measure
                pass
        return None

    def _dispatch(self) -> ServerEvent | None:
        name, data = self._name or "message", self._data
        self._name, self._data = "", []
        return ServerEvent(name, "\n".join(data)) if data else None
