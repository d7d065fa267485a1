"""Stop strings: found wherever a text is cut into pieces, never shown, and no text is kept back longer than it must be."""

from collections.abc import Sequence


class StopMatcher:
    """Feed it text; it gives back what is safe to show. `matched` is the stop string that ended the text, once one did."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held: str = ""  # the longest end of the text that could be the beginning of a stop string
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """What is now certain not to belong to a stop string. After a match: everything before it, then nothing."""
        if self.matched is not None:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        # The one that is complete first ends the text, as if it had come character by character; of several, the longest.
        found = [(text.find(s) + len(s), -len(s), s) for s in self._stop if s in text]
        if found:
            end, _, self.matched = min(found)
            self._held = ""
            return text[: end - len(self.matched)]
        keep = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was kept back, at the end of a text that no stop string ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, s: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `s`."""
    return next((n for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n])), 0)
