"""Token ids → text, as they come."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Text of a growing list of tokens. A character whose bytes are spread over several tokens appears once, whole, with the last
    of them; bytes that never become a character never appear.

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
        if len(text) <= len(before) or text.endswith(_INCOMPLETE):
            return ""
        self._window = self._window[self._num_given_out :]
        self._num_given_out = len(self._window)
        return text[len(before) :]
