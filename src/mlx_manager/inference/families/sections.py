"""Generated text, split at markers into what is said, what is thought and what is called, whatever pieces it comes in.

Nothing is lost: a section that turns out not to be a call, or a marker that never closes, comes out as the text it is.
The pieces of a text cover it in order and without gaps; each says how many of its characters it accounts for.

The arguments of a call to an offered tool go out while they are written, where the format allows. From then on it is a call: if its
arguments break off, they are closed as they are, so that they still join to one JSON object, and what follows the break is text.
If the reply ends in them, they are closed too, and what was held back of them (half a key, half a number) is nothing's.
"""

from collections.abc import Sequence
from enum import Enum, auto

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.channels import ChannelSplitter
from mlx_manager.inference.families.family import ArgumentReader, ArgumentStream, Call, Family, Section, Tag
from mlx_manager.inference.families.marks import overlap
from mlx_manager.inference.families.pieces import Arguments, CallOpened, Calls, Markup, Piece, Reasoning, Text, joined

# Characters by which a format tells that text is no call: more would make every token's look at a long call cost its length.
_LOOK_AHEAD = 100
# Characters within which a call must get from its mark to its arguments for these to be passed on while they are written.
_HEAD = 400


class _In(Enum):
    START = auto()  # nothing but white space so far: reasoning may open, or a call without a mark begin
    TEXT = auto()
    REASONING_START = auto()  # just opened: white space belongs to the tag
    REASONING = auto()
    REASONED = auto()  # just closed: white space belongs to the tag, and the reply begins
    CALL = auto()
    ARGUMENTS = auto()  # of a call that was opened
    ARGUED = auto()  # after them: what closes the call, or leads to the next one of its section
    CALLED = auto()  # white space between calls is nobody's


class Splitter:
    """`opened` is the tag that the prompt already opened; tools that were not offered are not called."""

    def __init__(self, family: Family, *, tools: Sequence[ToolSpec] = (), opened: Tag | None = None) -> None:
        self._family = family
        self._tools = tools
        self._format = family.tool_format if tools else None
        self._state = _In.REASONING_START if opened else _In.START
        self._tag: Tag | None = opened
        self._held = ""
        self._offered = {tool.name for tool in tools}
        # What means something amid text: a call, and what its section is to be read as if it began with; a thought; an end of nothing.
        self._marks: dict[str, str | Tag | None] = {}
        for tag in family.reasoning_tags:
            if tag.anywhere:
                self._marks |= {tag.open: tag, tag.close: None}
        if self._format is not None:
            self._marks |= {self._format.start: ""} if self._format.start else {}
            self._marks |= {stream.bare: stream.bare for stream in self._format.streams if stream.bare}
        self._mark = ""  # what opened the call that is held, and what its section is to be read as if it began with
        self._resume = ""
        self._search_from = 0  # in a call section: where an unseen end marker can begin at the earliest
        self._stream: ArgumentStream | None = None
        self._reader: ArgumentReader | None = None
        self._num_read = 0  # how many of the characters that are held the reader has

    @property
    def is_reasoning(self) -> bool:
        return self._state in (_In.REASONING_START, _In.REASONING)

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._advance(pieces, final=False):
            pass
        return joined(pieces)

    def finish(self) -> list[Piece]:
        """What was kept back, at the end of the text."""
        pieces: list[Piece] = []
        while self._advance(pieces, final=True):
            pass
        assert not self._held, "all text is accounted for"
        return joined(pieces)

    # Each of these takes something off the front of what is held and says whether it did.

    def _advance(self, out: list[Piece], *, final: bool) -> bool:
        if not self._held and self._state is not _In.ARGUMENTS:
            return False
        match self._state:
            case _In.START | _In.REASONED:
                return self._begin(out, final=final)
            case _In.TEXT:
                return self._say(out, final=final)
            case _In.REASONING_START:
                return self._open(out, final=final)
            case _In.REASONING:
                return self._think(out, final=final)
            case _In.CALL:
                return self._call(out, final=final)
            case _In.ARGUMENTS:
                return self._argue(out, final=final)
            case _In.ARGUED:
                return self._after_arguments(out, final=final)
            case _In.CALLED:
                return self._between_calls(out, final=final)

    def _take(self, num_chars: int) -> str:
        taken, self._held = self._held[:num_chars], self._held[num_chars:]
        return taken

    def _begin(self, out: list[Piece], *, final: bool) -> bool:
        body = self._held.lstrip()
        blank = len(self._held) - len(body)
        after_reasoning = self._state is _In.REASONED
        if not body:
            if not final:
                return False
            out.append(Markup(len(self._take(blank))) if after_reasoning else Text(self._take(blank)))
            return True
        openers = tuple(tag for tag in self._family.reasoning_tags if tag.anywhere or not after_reasoning)
        for tag in openers:
            if body.startswith(tag.open):
                out.append(Markup(len(self._take(blank + len(tag.open)))))
                self._tag, self._state = tag, _In.REASONING_START
                return True
        if not final and any(tag.open.startswith(body) for tag in openers):
            return False
        if self._format is not None and not self._format.start and self._format.may_begin(body[:_LOOK_AHEAD]):
            if self._open_call(out, blank):
                return True
            if not final:
                return False
            section = self._format.parse(body, self._tools)
            if section is not None:
                out.append(Calls(section.calls, len(self._take(blank + section.num_chars))))
                self._state = _In.CALLED
                return True
        if after_reasoning and blank:
            out.append(Markup(len(self._take(blank))))
        self._state = _In.TEXT
        return True

    def _open(self, out: list[Piece], *, final: bool) -> bool:
        """Just inside a tag. Some models open it twice."""
        assert self._tag is not None
        body = self._held.lstrip()
        blank = len(self._held) - len(body)
        if body.startswith(self._tag.open):
            out.append(Markup(len(self._take(blank + len(self._tag.open)))))
            return True
        if not final and self._tag.open.startswith(body):
            return False
        if blank:
            out.append(Markup(len(self._take(blank))))
        self._state = _In.REASONING
        return True

    def _think(self, out: list[Piece], *, final: bool) -> bool:
        assert self._tag is not None
        at = self._held.find(self._tag.close)
        if at >= 0:
            thought = self._held[:at].rstrip()
            if thought:
                out.append(Reasoning(self._take(len(thought))))
            out.append(Markup(len(self._take(at - len(thought) + len(self._tag.close)))))
            self._state = _In.REASONED
            return True
        keep = 0 if final else overlap(self._held, self._tag.close)
        ready = self._held[: len(self._held) - keep]
        if not final:
            ready = ready.rstrip()  # the white space before the closing tag is the tag's
        if ready:
            out.append(Reasoning(self._take(len(ready))))
        return bool(ready)

    def _say(self, out: list[Piece], *, final: bool) -> bool:
        found = [(at, mark) for mark in self._marks if (at := self._held.find(mark)) >= 0]
        if found:
            at, mark = min(found, key=lambda each: each[0])
            said = self._held[:at].rstrip()
            if said:
                out.append(Text(self._take(len(said))))
            match self._marks[mark]:
                case str(resume):
                    # The white space stays in front of the mark: it comes back if the section is no call.
                    self._begin_call(mark, resume)
                case tag:
                    out.append(Markup(len(self._take(at - len(said) + len(mark)))))
                    if tag is not None:
                        self._tag, self._state = tag, _In.REASONING_START
            return True
        ready = self._held
        if not final and self._marks:
            ready = ready[: len(ready) - max(overlap(ready, mark) for mark in self._marks)].rstrip()
        if ready:
            out.append(Text(self._take(len(ready))))
        return bool(ready)

    def _begin_call(self, mark: str, resume: str = "") -> None:
        self._state, self._mark, self._resume, self._search_from = _In.CALL, mark, resume, 0

    def _call(self, out: list[Piece], *, final: bool) -> bool:
        """From the mark that opens a call, white space before it included."""
        assert self._format is not None
        end, resume = self._format.end, self._resume
        begin = self._held.find(self._mark) + len(self._mark)
        if not self._format.may_begin(resume + self._held[begin : begin + _LOOK_AHEAD]):
            return self._mention(out, begin)
        if self._open_call(out, begin):
            return True
        at = self._held.find(end, max(begin, self._search_from)) if end else -1
        if at < 0 and not final:
            self._search_from = max(begin, len(self._held) - len(end) + 1)
            return False
        body = resume + (self._held[begin:] if at < 0 else self._held[begin:at])  # some models leave the last mark out
        section = self._parse(body)
        if section is not None:
            closing = 0 if at < 0 else len(end)
            out.append(Calls(section.calls, len(self._take(begin + section.num_chars - len(resume) + closing))))
            self._state = _In.CALLED
            return True
        if at >= 0 and self._format.is_open(body):
            self._search_from = at + 1
            return True
        return self._mention(out, begin)

    def _open_call(self, out: list[Piece], begin: int) -> bool:
        """Whether the text from `begin` on is a call for certain, by a name that was offered: then its arguments go out as they come."""
        assert self._format is not None
        if not self._format.streams:
            return False
        resume = self._resume if self._state is _In.CALL else ""
        beginning = resume + self._held[begin : begin + _HEAD]
        for stream in self._format.streams:
            match = stream.head.match(beginning)
            if match is None or match.lastindex is None or match[match.lastindex] not in self._offered:
                continue
            name = match[match.lastindex]
            out.append(CallOpened(name, len(self._take(begin + match.end() - len(resume)))))
            self._state, self._stream, self._reader, self._num_read = _In.ARGUMENTS, stream, stream.reader(name, self._tools), 0
            return True
        return False

    def _argue(self, out: list[Piece], *, final: bool) -> bool:
        assert self._reader is not None
        text, used = self._reader.read(self._held[self._num_read :])
        self._num_read = len(self._held) - used
        self._take(used)
        is_over = self._reader.state != "open" or final
        if is_over:
            text += self._reader.close()
            if self._reader.state == "open":
                used += len(self._take(len(self._held)))
            self._state = _In.ARGUED
        if text or used or is_over:
            out.append(Arguments(text, used, is_over))
        return is_over

    def _after_arguments(self, out: list[Piece], *, final: bool) -> bool:
        assert self._stream is not None
        stream, body = self._stream, self._held.lstrip()
        blank = len(self._held) - len(body)
        if any(body.startswith(mark) for mark in stream.more):
            self._begin_call(next(mark for mark in stream.more if body.startswith(mark)), stream.resume)
            return True
        closer = next((closer for closer in (stream.end, *stream.closers) if closer and body.startswith(closer)), None)
        if closer is not None:
            out.append(Markup(len(self._take(blank + len(closer)))))
            if closer == stream.end:
                self._state = _In.CALLED
            return True
        if not final and any(mark.startswith(body) for mark in (stream.end, *stream.closers, *stream.more)):
            return False
        self._state = _In.CALLED
        return True

    def _parse(self, body: str) -> Section | None:
        assert self._format is not None
        start = self._format.start
        section = self._format.parse(body, self._tools)
        if section is not None or not start or start not in body:
            return section
        # Some models open the next call without closing the one before.
        calls: list[Call] = []
        for part in body.split(start):
            section = self._format.parse(part, self._tools)
            if section is None:
                return None
            calls += section.calls
        return Section(tuple(calls), len(body))

    def _mention(self, out: list[Piece], num_chars: int) -> bool:
        """The mark opened no call: it is text, and so is what follows up to the next one."""
        out.append(Text(self._take(num_chars)))
        self._state = _In.TEXT
        return True

    def _between_calls(self, out: list[Piece], *, final: bool) -> bool:
        body = self._held.lstrip()
        if not body:
            if final:
                out.append(Markup(len(self._take(len(self._held)))))
            return final
        mark = self._format.start if self._format is not None else ""
        if mark and body.startswith(mark):
            out.append(Markup(len(self._take(len(self._held) - len(body)))))
            self._begin_call(mark)
            return True
        if mark and not final and mark.startswith(body):
            return False
        self._state = _In.TEXT
        return True


def splitter_for(family: Family, *, tools: Sequence[ToolSpec] = (), opened: Tag | None = None) -> Splitter | ChannelSplitter:
    return ChannelSplitter(tools=tools) if family.channels else Splitter(family, tools=tools, opened=opened)
