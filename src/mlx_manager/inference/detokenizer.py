"""Token ids → text, as they come."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
_INCOMPLETE = "\ufffd"
# A character has at most four bytes, and hardly ever do so many tokens in a row all end inside one: more are no text.
_MAX_HELD = 16


class Detokenizer:
    """Text of a growing list of tokens. A character whose bytes are spread over several tokens appears once, whole, with the last
    of them; one that is not complete at the end never appears. Bytes that are no text at all come out as U+FFFD.

    How a token reads may depend on the one before it (a leading space, say), so a window of tokens that have been given out
    is decoded again with the new ones and only what it adds is new. The window starts anew with each piece given out: the work per
    token does not grow with the text.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_given_out = 0  # of the window's tokens

    def add(self, token: int) -> str:
        """The text that this token completes, often empty in the middle of a character."""
        self._window.append(token)
        before = self._decode(self._window[: self._num_given_out])
        text = self._decode(self._window)
        is_held = len(text) <= len(before) or text.endswith(_INCOMPLETE)
        if is_held and len(self._window) - self._num_given_out < _MAX_HELD:
            return ""
        self._window = self._window[self._num_given_out :]
        self._num_given_out = len(self._window)
        return text[len(before) :]

    def finish(self) -> str:
        """The whole characters that came with the beginning of one that never ended."""
        before = self._decode(self._window[: self._num_given_out])
        return self._decode(self._window)[len(before) :].rstrip(_INCOMPLETE)
