"""Generated text that comes as messages on channels: `<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final…`.

What is thought is on `analysis`, what is said on `final` and `commentary`, and a message `to=functions.name` is a call. As in
`sections`, nothing is lost and the pieces do not matter: what has no such head is text, and so is a call that is none.
"""

import re
from collections.abc import Sequence
from enum import Enum, auto

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import Call
from mlx_manager.inference.families.marks import overlap
from mlx_manager.inference.families.pieces import Arguments, CallOpened, Calls, Markup, Piece, Reasoning, Text, joined
from mlx_manager.inference.families.tool_formats.json_arguments import JsonArguments, read_arguments

_HEAD = re.compile(
    r"\s*(?:<\|start\|>)?(?:assistant(?= to=|<\|))?(?: ?to=[\w.:-]+)?"
    r"(?:<\|channel\|>([^<]*)(?:<\|constrain\|>[^<]*)?)?<\|message\|>"
)
_BEGINNINGS = ("<|start|>", "<|channel|>", "<|message|>", "assistant<|", "assistant to=", "to=")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.:-]+)")
_MAX_HEAD = 400  # characters
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_MARKS = (*_ENDS, "<|start|>", "<|channel|>")  # the last two where a model leaves the end of a message out


class _In(Enum):
    HEAD = auto()
    SAID = auto()
    THOUGHT = auto()
    CALL = auto()  # a call's arguments, of which it is not certain that they are some
    ARGUMENTS = auto()


class ChannelSplitter:
    """A message to a function that was not offered is held until it has ended."""

    def __init__(self, *, tools: Sequence[ToolSpec] = ()) -> None:
        self._offered = {tool.name for tool in tools}
        self._state = _In.HEAD
        self._held = ""
        self._name = ""
        self._reader = JsonArguments()
        self._num_read = 0
        self._head = 0  # in a call: how many of the characters that are held are its head

    @property
    def is_reasoning(self) -> bool:
        return self._state is _In.THOUGHT

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        return self._pieces(final=False)

    def finish(self) -> list[Piece]:
        pieces = self._pieces(final=True)
        assert not self._held, "all text is accounted for"
        return pieces

    def _pieces(self, *, final: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while self._advance(pieces, final=final):
            pass
        return joined(pieces)

    def _advance(self, out: list[Piece], *, final: bool) -> bool:
        match self._state:
            case _In.HEAD:
                return self._begin(out, final=final)
            case _In.SAID | _In.THOUGHT:
                return self._pass(out, final=final)
            case _In.CALL:
                return self._call(out, final=final)
            case _In.ARGUMENTS:
                return self._argue(out, final=final)

    def _take(self, num_chars: int) -> str:
        taken, self._held = self._held[:num_chars], self._held[num_chars:]
        return taken

    def _begin(self, out: list[Piece], *, final: bool) -> bool:
        if not self._held:
            return False
        head = _HEAD.match(self._held[:_MAX_HEAD])
        if head is None:
            body = self._held.lstrip()
            if not final and len(self._held) < _MAX_HEAD and any(b.startswith(body) or body.startswith(b) for b in _BEGINNINGS):
                return False
            self._state = _In.SAID
            return True
        recipient = _RECIPIENT.search(head[0])
        if recipient is not None and self._offered:
            self._name, self._head, self._state = recipient[1], head.end(), _In.CALL
            return True
        if recipient is not None:
            out.append(Text(self._take(head.end())))
            self._state = _In.SAID
            return True
        out.append(Markup(len(self._take(head.end()))))
        self._state = _In.THOUGHT if (head[1] or "").strip() == "analysis" else _In.SAID
        return True

    def _mark(self, start: int = 0) -> tuple[int, str] | None:
        """The first mark that ends a message, and where."""
        return min(((at, mark) for mark in _MARKS if (at := self._held.find(mark, start)) >= 0), default=None)

    def _end(self, out: list[Piece], mark: str) -> None:
        """What is held begins with the mark that ends a message; `<|start|>` and `<|channel|>` begin the next."""
        if mark in _ENDS:
            out.append(Markup(len(self._take(len(mark)))))
        self._state = _In.HEAD

    def _pass(self, out: list[Piece], *, final: bool) -> bool:
        kind = Reasoning if self._state is _In.THOUGHT else Text
        found = self._mark()
        if found is not None:
            at, mark = found
            if at:
                out.append(kind(self._take(at)))
            self._end(out, mark)
            if mark not in _ENDS and _HEAD.match(self._held[:_MAX_HEAD]) is None and (final or len(self._held) >= _MAX_HEAD):
                out.append(Text(self._take(len(mark))))  # begins nothing: it is text
                self._state = _In.SAID
            return True
        keep = 0 if final else max(overlap(self._held, mark) for mark in _MARKS)
        if len(self._held) > keep:
            out.append(kind(self._take(len(self._held) - keep)))
        return False

    def _call(self, out: list[Piece], *, final: bool) -> bool:
        """From a call's head."""
        body = self._held[self._head :].lstrip()
        if self._name in self._offered and re.match(r'\{\s*["}]', body):
            out.append(CallOpened(self._name, len(self._take(len(self._held) - len(body)))))
            self._state, self._reader, self._num_read = _In.ARGUMENTS, JsonArguments(), 0
            return True
        found = self._mark(self._head)
        if found is None and not final:
            return False
        end = len(self._held) if found is None else found[0]
        arguments = read_arguments(self._held[self._head : end] or "{}")
        taken = self._take(end)
        out.append(Text(taken) if arguments is None else Calls((Call(self._name, arguments),), len(taken)))
        self._state = _In.HEAD
        if found is not None:
            self._end(out, found[1])
        return True

    def _argue(self, out: list[Piece], *, final: bool) -> bool:
        text, used = self._reader.read(self._held[self._num_read :])
        self._num_read = len(self._held) - used
        self._take(used)
        is_over = self._reader.state != "open" or final
        if is_over:
            text += self._reader.close()
            if self._reader.state == "open":
                used += len(self._take(len(self._held)))
            self._state = _In.SAID
        if text or used or is_over:
            out.append(Arguments(text, used, is_over))
        return is_over
