"""What the pool of models costs: a request for a hot model, a cold start beside mlx-lm's own loading, and what memory comes back."""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mlx_manager.bench.processes import PeerError

PROGRAM = Path(__file__).with_name("programs") / "models_in_turn.py"


class PoolCost(BaseModel):
    """Seconds and bytes. `hot_s`: the median and the 99th percentile of lending a loaded model and taking it back. `cold_s`: to the first
    token, for the `first` time, `again` after the model was unloaded, and by `mlx_lm`; each measured in turn. Bytes: with the model
    loaded, and after each time it was unloaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hot_s: tuple[float, float]
    cold_s: Mapping[str, tuple[float, ...]]
    loaded_bytes: int
    mlx_bytes: tuple[int, ...]
    resident_bytes: tuple[int, ...]

    def ratio(self, when: str) -> float:
        """Of times to the first token, ours over mlx-lm's: the median of those taken in one turn."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.cold_s[when], self.cold_s["mlx_lm"], strict=True))

    def markdown(self) -> str:
        median, p99 = self.hot_s
        rows = [
            ("a hot model, lent and taken back", f"{1e6 * median:.1f} us (p99 {1e6 * p99:.1f} us)", "", ""),
            ("a cold model to its first token, for the first time", *self._cold("first")),
            ("the same again, after it was unloaded", *self._cold("again")),
        ]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        memory = (
            f"Loaded, used and unloaded {len(self.mlx_bytes)} times: MLX holds {_megabytes(self.loaded_bytes)} with the model and, after "
            f"it has left, at most {_megabytes(max(self.mlx_bytes))}; the process has {_megabytes(self.resident_bytes[0])} after the first "
            f"time and {_megabytes(self.resident_bytes[-1])} after the last.\n"
        )
        return f"| What | Ours | mlx-lm | Ratio of times |\n|---|--:|--:|--:|\n{table}\n\n{memory}"

    def _cold(self, when: str) -> Sequence[str]:
        ours, theirs = self.cold_s[when], self.cold_s["mlx_lm"]
        return f"{statistics.median(ours):.2f} s", f"{statistics.median(theirs):.2f} s", f"{self.ratio(when):.2f}"


def measure_pool(model_dir: Path, *, num_cold: int, num_cycles: int, limit_s: float) -> PoolCost:
    """Raises `PeerError` if it fails or takes longer."""
    command = [sys.executable, str(PROGRAM), str(model_dir), str(num_cold), str(num_cycles)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        raise PeerError(f"the pool was not measured within {limit_s:.0f} s") from None
    if done.returncode != 0:
        raise PeerError(f"the pool cannot be measured: {done.stderr[-2000:].decode('utf-8', errors='replace').strip()}")
    return PoolCost.model_validate(json.loads(done.stdout))


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
