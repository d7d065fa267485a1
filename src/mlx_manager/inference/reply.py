"""One reply: tokens → text → sections → events, with its stop strings. The other half of rendering a prompt."""

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_manager.core.events import (
    ChoiceFinished,
    Event,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
)
from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.detokenizer import Decode, Detokenizer
from mlx_manager.inference.engine.sequence import EndReason, Token
from mlx_manager.inference.families.family import Call, Family, Tag
from mlx_manager.inference.families.pieces import Arguments, CallOpened, Calls, Markup, Piece, Reasoning, Text
from mlx_manager.inference.families.sections import splitter_for
from mlx_manager.inference.stopping import StopMatcher

DescribeToken = Callable[[int], tuple[str, bytes]]


class ReplyReader:
    """Reads the tokens of one choice. With `splits` False the text is passed on as it is, markup and all (raw completions).
    `ended` is true once a stop string, or the one call that was allowed, has ended the reply."""

    def __init__(
        self,
        choice: int,
        *,
        family: Family,
        decode: Decode,
        describe: DescribeToken,
        stop: Sequence[str] = (),
        tools: Sequence[ToolSpec] = (),
        opened: Tag | None = None,
        splits: bool = True,
        parallel_tool_calls: bool = True,
    ) -> None:
        self._choice = choice
        self._describe = describe
        self._detokenizer = Detokenizer(decode)
        self._splitter = splitter_for(family, tools=tools, opened=opened) if splits else None
        self._stop = StopMatcher(stop)
        self._parallel = parallel_tool_calls
        self._num_calls = 0
        self._unread: deque[_Unread] = deque()  # only where log probabilities are wanted
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.ended = False

    def read(self, token: Token) -> list[Event]:
        """The events that a token brings about."""
        self.num_tokens += 1
        text = self._detokenizer.add(token.token)
        if token.logprob is not None:
            top = tuple(TokenLogprob(*self._describe(t), logprob) for t, logprob in token.top)
            self._unread.append(_Unread(TokenLogprob(*self._describe(token.token), token.logprob, top), len(text)))
        pieces = self._pieces(text)
        if self._splitter is not None and self._splitter.is_reasoning:
            self.num_reasoning_tokens += 1
        return self._events(pieces)

    def finish(self, reason: EndReason, *, at_context_end: bool) -> list[Event]:
        """The rest, and how it ended: `reason` is the engine's, which knows nothing of strings and calls."""
        events: list[Event] = []
        if not self.ended:
            text = self._detokenizer.finish()
            if self._unread:
                self._unread[-1].num_chars += len(text)
            events += self._events(self._pieces(text))
            if self._splitter is not None:
                events += self._events(self._splitter.finish())
        if not self.ended and (text := self._stop.flush()):
            events.append(self._text_delta(text))
        final: FinishReason
        if self._stop.matched is not None:
            final = "stop_string"
        elif reason == "length":
            final = "context_full" if at_context_end else "length"
        else:
            final = "tool_calls" if self._num_calls else "stop"
        return [*events, ChoiceFinished(final, self._choice, self._stop.matched)]

    def _pieces(self, text: str) -> list[Piece]:
        if self._splitter is not None:
            return self._splitter.feed(text)
        return [Text(text)] if text else []

    def _events(self, pieces: Sequence[Piece]) -> list[Event]:
        events: list[Event] = []
        for piece in pieces:
            if self.ended:
                break
            if not isinstance(piece, Text) and (held := self._stop.flush()):
                events.append(self._text_delta(held))
            match piece:
                case Text(text):
                    if safe := self._stop.feed(text):
                        events.append(self._text_delta(safe))
                    self.ended = self._stop.matched is not None
                case Reasoning(text):
                    self._pass(piece.num_chars)
                    events.append(ReasoningDelta(text, self._choice))
                case Calls(calls):
                    self._pass(piece.num_chars)
                    events += self._call_events(calls if self._parallel else calls[:1])
                    self.ended = not self._parallel
                case CallOpened(name):
                    self._pass(piece.num_chars)
                    events.append(self._call_start(name))
                case Arguments(text, num_chars, closes):
                    self._pass(num_chars)
                    if text:
                        events.append(ToolCallDelta(self._num_calls - 1, text, self._choice))
                    self.ended = closes and not self._parallel
                case Markup():
                    self._pass(piece.num_chars)
        return events

    def _call_events(self, calls: Sequence[Call]) -> list[Event]:
        events: list[Event] = []
        for call in calls:
            events.append(self._call_start(call.name))
            events.append(ToolCallDelta(self._num_calls - 1, call.arguments, self._choice))
        return events

    def _call_start(self, name: str) -> ToolCallStart:
        index, self._num_calls = self._num_calls, self._num_calls + 1
        return ToolCallStart(index, f"call_{secrets.token_urlsafe(18)}", name, self._choice)

    def _text_delta(self, text: str) -> TextDelta:
        return TextDelta(text, self._choice, tuple(self._pass(len(text))))

    def _pass(self, num_chars: int) -> list[TokenLogprob]:
        """Counts characters as given out, or as markup; the tokens that begin within them."""
        begun: list[TokenLogprob] = []
        while self._unread and num_chars > 0:
            entry = self._unread[0]
            if entry.logprob is not None:
                begun.append(entry.logprob)
                entry.logprob = None
            used = min(num_chars, entry.num_chars)
            num_chars -= used
            entry.num_chars -= used
            if entry.num_chars == 0:
                self._unread.popleft()
        return begun


@dataclass(slots=True)
class _Unread:
    """A token's characters that have not been given out; its log probability, until its first one has."""

    logprob: TokenLogprob | None
    num_chars: int
