"""How many prompt tokens a step may compute, so that those who decode beside it do not wait too long for their next one. No tensors."""

from dataclasses import dataclass

# Weight of the newest measurement; a step is tens of milliseconds, so this follows a change within a second.
_NEWEST = 0.2
_SMALLEST = 32  # tokens: a block; below that a pass costs more than it computes


@dataclass(slots=True)
class Pace:
    """`max_budget` prompt tokens a step where nobody decodes; else as many as keep the step within `target_s` seconds, learnt from the
    steps before."""

    max_budget: int
    target_s: float
    decode_s: float | None = None  # of a step that only decodes
    prefill_s: float | None = None  # a prompt token

    def budget(self, *, decoding: bool) -> int:
        if not decoding or self.prefill_s is None:
            return self.max_budget if not decoding else min(self.max_budget, 4 * _SMALLEST)
        left = self.target_s - (self.decode_s or 0.0)
        return max(min(_SMALLEST, self.max_budget), min(self.max_budget, int(left / max(self.prefill_s, 1e-9))))

    def observe(self, seconds: float, *, num_rows: int, num_prefilled: int) -> None:
        """A step took this long, from when the device began with it."""
        if num_prefilled == 0:
            self.decode_s = _blend(self.decode_s, seconds)
        else:
            own = seconds - (self.decode_s or 0.0) if num_rows else seconds
            self.prefill_s = _blend(self.prefill_s, max(own, 1e-7) / num_prefilled)


def _blend(old: float | None, new: float) -> float:
    return new if old is None else (1 - _NEWEST) * old + _NEWEST * new
