"""What holds one reply to its form, token by token: reasoning first and for as long as it may, then the answer or the calls.

The reply is always in one stage. What is free has no mask and costs nothing; where a grammar rules, its matcher makes one.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from llguidance import LLMatcher

Decode = Callable[[Sequence[int]], str]
# Tokens that a mark of several may be spread over, with something before and after.
_TAIL = 24
# Of the processor, for a token. Everybody waits for it: what takes more than its share is a debt, and at a limit the reply ends.
_SHARE_S, _MAX_DEBT_S = 0.025, 1.0
# White space between reasoning and answer that a grammar does not know of.
_MAX_LEADING = 2


@dataclass(frozen=True, slots=True)
class Mark:
    """A text that means something in a reply: one token where the vocabulary has it, else those that spell it."""

    text: str
    tokens: tuple[int, ...]

    @property
    def token(self) -> int | None:
        return self.tokens[0] if len(self.tokens) == 1 else None


@dataclass(frozen=True, slots=True)
class Thought:
    """How reasoning is marked here. `is_open`: the prompt has begun it; `may_open`: the reply may, and `must_open` if an answer is to
    have a form. `budget` in tokens."""

    open: Mark
    close: Mark
    is_open: bool
    may_open: bool
    budget: int | None
    must_open: bool = False


@dataclass(frozen=True, slots=True)
class Lead:
    """Tokens that come before an answer that a grammar rules: at the beginning of a reply, and after its reasoning."""

    at_first: tuple[int, ...] = ()
    after_reasoning: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Calls:
    """Free text in which `mark` opens a call; what follows it matches `rest`."""

    mark: Mark
    rest: LLMatcher
    once: bool


_NO_LEAD = Lead()


class _In(Enum):
    BEGINNING = auto()  # nothing said yet: reasoning may open
    REASONING = auto()
    FORCED = auto()  # the rest of a mark
    ANSWER = auto()
    CALL = auto()


class Guide:
    """A `Constraint` (engine/sequence.py), for what `field` asked for. `answer` None: the answer is free. Tokens of `leading` (white space)
    may stand between reasoning and an answer that a grammar rules; `banned` ones have no place in a free answer."""

    def __init__(
        self,
        *,
        field: str,
        decode: Decode,
        vocab_size: int,
        stop_tokens: frozenset[int],
        thought: Thought | None = None,
        answer: LLMatcher | None = None,
        calls: Calls | None = None,
        lead: Lead = _NO_LEAD,
        leading: frozenset[int] = frozenset(),
        banned: frozenset[int] = frozenset(),
    ) -> None:
        self.field = field
        self._decode = decode
        self._vocab_size = vocab_size
        self._stop_tokens = stop_tokens
        self._thought = thought
        self._answer = answer
        self._calls = calls
        self._lead = lead
        self._leading = leading
        self._banned = banned
        self._at = _In.REASONING if thought is not None and thought.is_open else _In.BEGINNING
        self._tail: list[int] = []  # the last tokens of this stage
        self._forced: list[int] = []
        self._after_forced = _In.ANSWER
        self._num_reasoning = 0
        self._has_reasoned = self._at is _In.REASONING  # and has not answered yet
        self._num_leading = _MAX_LEADING  # nothing may stand before an answer without reasoning
        self._has_begun = False  # the answer
        self._call: LLMatcher | None = None
        self._debt_s = 0.0
        self._close_if_spent()
        if self._at is _In.BEGINNING and answer is not None:
            if thought is not None and thought.must_open:
                self._force(thought.open.tokens, _In.REASONING)
            elif lead.at_first:
                self._force(lead.at_first, _In.ANSWER)

    def copy(self) -> "Guide":
        """For another reply to the same prompt; neither has begun."""
        return Guide(
            field=self.field,
            decode=self._decode,
            vocab_size=self._vocab_size,
            stop_tokens=self._stop_tokens,
            thought=self._thought,
            answer=None if self._answer is None else self._answer.deep_copy(),
            calls=self._calls,
            lead=self._lead,
            leading=self._leading,
            banned=self._banned,
        )

    def mask(self) -> bytes | None:
        match self._at:
            case _In.REASONING:
                return None if self._answer is None else self._all_but(self._stop_tokens)
            case _In.FORCED:
                return _with(bytes(_num_bytes(self._vocab_size)), self._forced[:1])
            case _In.CALL:
                assert self._call is not None
                return self._allowed(self._call)
            case _In.BEGINNING | _In.ANSWER:
                if self._answer is None:
                    return self._all_but(self._banned) if self._banned else None
                return _with(self._allowed(self._answer), self._ways_out())

    def _allowed(self, matcher: LLMatcher) -> bytes:
        began = time.thread_time()
        mask = matcher.compute_bitmask()
        self._debt_s = max(0.0, self._debt_s - _SHARE_S) + time.thread_time() - began
        return mask

    def _consume(self, matcher: LLMatcher, token: int) -> bool:
        began = time.thread_time()
        is_consumed = matcher.consume_token(token)
        self._debt_s += time.thread_time() - began
        return is_consumed

    def accept(self, token: int) -> bool:
        """False if the form does not go on with it, or has come to cost too much."""
        return self._debt_s < _MAX_DEBT_S and self._go_on_from_here(token)

    def _go_on_from_here(self, token: int) -> bool:
        self._tail = [*self._tail, token][-_TAIL:]
        match self._at:
            case _In.REASONING:
                self._num_reasoning += 1
                assert self._thought is not None
                if self._has_come(self._thought.close, token):
                    self._enter(_In.ANSWER)
                else:
                    self._close_if_spent()
                return True
            case _In.FORCED:
                del self._forced[0]
                if not self._forced:
                    self._enter(self._after_forced)
                return True
            case _In.CALL:
                return self._go_on_with_call(token)
            case _In.BEGINNING | _In.ANSWER:
                return self._go_on(token)

    @property
    def is_complete(self) -> bool:
        match self._at:
            case _In.CALL:
                return self._call is not None and self._call.is_stopped()  # another may follow only where `_go_on_with_call` says so
            case _In.BEGINNING | _In.ANSWER:
                return self._answer is not None and self._answer.is_stopped()
            case _In.REASONING | _In.FORCED:
                return False

    def _ways_out(self) -> list[int]:
        """Tokens that lead elsewhere while the answer has not begun."""
        if self._has_begun:
            return []
        ways: list[int] = []
        if self._may_open is not None:
            ways.append(self._may_open.tokens[0])
        if self._calls is not None and self._calls.mark.token is not None:
            ways.append(self._calls.mark.token)
        if self._num_leading < _MAX_LEADING:
            ways += self._leading
        return ways

    @property
    def _may_open(self) -> Mark | None:
        is_possible = self._at is _In.BEGINNING and self._thought is not None and self._thought.may_open
        return self._thought.open if is_possible and self._thought is not None else None

    def _go_on(self, token: int) -> bool:
        opening = self._may_open
        if opening is not None and self._has_come(opening, token):
            self._enter(_In.REASONING)
            return True
        if opening is not None and self._answer is not None and token == opening.tokens[0]:
            self._force(opening.tokens[1:], _In.REASONING)
            return True
        if opening is not None and self._answer is None and opening.text.startswith(self._decode(self._tail).lstrip()):
            return True  # white space, or the beginning of the mark
        if self._calls is not None and not (self._answer is not None and self._has_begun) and self._has_come(self._calls.mark, token):
            self._enter(_In.CALL)
            return True
        if not self._has_begun and token in self._leading and self._num_leading < _MAX_LEADING:
            self._num_leading += 1
            return True
        if self._at is _In.BEGINNING:
            self._enter(_In.ANSWER)
        self._has_begun = True
        return self._answer is None or self._consume(self._answer, token)

    def _go_on_with_call(self, token: int) -> bool:
        assert self._call is not None
        assert self._calls is not None
        if not self._consume(self._call, token):
            return False
        if self._call.is_stopped() and self._answer is None and not self._calls.once:
            self._enter(_In.ANSWER)
        return True

    def _enter(self, stage: _In) -> None:
        if stage is _In.ANSWER and self._has_reasoned:
            self._num_leading = 0
            lead, self._has_reasoned = self._lead.after_reasoning, False
            if lead and self._answer is not None:
                self._force(lead, _In.ANSWER)
                return
        self._has_reasoned = self._has_reasoned or stage is _In.REASONING
        self._at, self._tail = stage, []
        if stage is _In.CALL and self._calls is not None:
            self._call = self._calls.rest.deep_copy()
        self._close_if_spent()

    def _force(self, tokens: Sequence[int], then: _In) -> None:
        self._at, self._forced, self._after_forced = _In.FORCED, list(tokens), then

    def _close_if_spent(self) -> None:
        thought = self._thought
        if self._at is _In.REASONING and thought is not None and thought.budget is not None and self._num_reasoning >= thought.budget:
            self._force(thought.close.tokens, _In.ANSWER)

    def _has_come(self, mark: Mark, token: int) -> bool:
        return token == mark.token if mark.token is not None else mark.text in self._decode(self._tail)

    def _all_but(self, tokens: frozenset[int]) -> bytes:
        return _with(b"\xff" * _num_bytes(self._vocab_size), tokens, is_allowed=False)


def _num_bytes(vocab_size: int) -> int:
    return (vocab_size + 31) // 32 * 4


def _with(mask: bytes, tokens: Iterable[int], *, is_allowed: bool = True) -> bytes:
    changed = bytearray(mask)
    for token in tokens:
        bit = 1 << (token & 7)
        changed[token >> 3] = changed[token >> 3] | bit if is_allowed else changed[token >> 3] & ~bit
    return bytes(changed)
