"""What an engine needs besides passes, for fakes: keys and values that nobody keeps."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mlx_manager.inference.engine.sequence import Sequence


class KeepsNothing:
    cache_name = "none"
    takes_pictures = False
    block_bytes = 1
    allocated_bytes = 0
    host_bytes = 0
    state_bytes = 0

    def start(self, pending: Any) -> None: ...
    def finish(self, pending: Any) -> None: ...

    def compute(self, pending: Any) -> Iterator[None]:
        return iter(())

    def save(self, sequence: Sequence, index: int, block: int, pending: Any) -> None:
        assert block in sequence.table

    def drop(self, block: int) -> None: ...

    def export(self, block: int) -> Mapping[str, "np.ndarray[Any, Any]"] | None:
        return None

    def load(self, block: int, arrays: Mapping[str, "np.ndarray[Any, Any]"]) -> bool:
        raise AssertionError

    def forget(self, sequence: Sequence) -> None: ...
    def clear(self) -> None: ...
