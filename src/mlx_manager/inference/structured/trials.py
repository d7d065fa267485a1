"""Whether a grammar can be compiled in time, found out where it does no harm."""

import json
from collections.abc import Sequence

from mlx_manager.confined.process import Confined
from mlx_manager.inference.structured import trial_process

LIMIT_S = 2.0  # of the processor
_TOO_LONG = f"it takes more than {LIMIT_S:g} seconds, or too much memory, to compile"


class Trials:
    """Of one vocabulary. Any thread."""

    def __init__(self, tokenizer: str, *, vocab_size: int, stop_tokens: Sequence[int]) -> None:
        """`tokenizer` as its library writes it. Raises `Overloaded` if there is no process to try anything in."""
        vocabulary = {"tokenizer": tokenizer, "vocab_size": vocab_size, "stop_tokens": list(stop_tokens)}
        self._process = Confined(trial_process, json.dumps(vocabulary).encode())

    def error(self, grammar: str, limit_s: float = LIMIT_S) -> str:
        """What is wrong with a grammar; empty if it may be compiled. Raises `Overloaded`."""
        said = self._process.done(grammar.encode(), limit_s)
        return _TOO_LONG if said is None else said.decode(errors="replace")
