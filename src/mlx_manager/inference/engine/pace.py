"""How many prompt tokens a step may compute, so that those who decode beside it do not wait too long for their next one. No tensors."""

from dataclasses import dataclass

# Weight of the newest measurement; a step is tens of milliseconds, so this follows a change within a second.
_NEWEST = 0.2
_SLOWER = 0.5
_SMALLEST = 32  # tokens: a block; below that a pass costs more than it computes


# A step may take so many times as long as one that only decodes: on a slow machine the target would leave nothing for prompts.
_STRETCH = 3.0
# Where as many more than one wait for their first token as decode, those who decode wait twice as long; at most so many times.
_MOST_CROWDED = 4.0
# What a step may take of its target for prompts that nobody waits for.
_BACKGROUND = 1 / 3


@dataclass(slots=True)
class Pace:
    """`max_budget` prompt tokens a step where nobody decodes; else as many as keep the step within `target_s` seconds, learnt from the
    steps before."""

    max_budget: int
    target_s: float
    decode_s: float | None = None  # of a step that only decodes
    prefill_s: float | None = None  # a prompt token
    _last: int = 0  # prompt tokens of the newest step that had any

    def budget(self, *, num_decoding: int, num_prefilling: int, in_background: bool = False) -> int:
        """`in_background`: nobody waits for these prompts, and whoever comes now waits for the end of the step."""
        if self.prefill_s is None:
            return min(self.max_budget, 4 * _SMALLEST) if num_decoding else self.max_budget
        decode_s = (self.decode_s or 0.0) if num_decoding else 0.0
        if in_background:
            step_s = max(_BACKGROUND * self.target_s, decode_s)
        elif num_decoding == 0:
            return self.max_budget
        else:
            crowded = min(1.0 + max(0, num_prefilling - 1) / num_decoding, _MOST_CROWDED)
            step_s = crowded * max(self.target_s, _STRETCH * decode_s)
        # What has not been seen is not trusted: a budget grows step by step.
        most = max(4 * _SMALLEST, 2 * self._last)
        fitting = int((step_s - decode_s) / max(self.prefill_s, 1e-9))
        return max(min(_SMALLEST, self.max_budget), min(self.max_budget, most, fitting))

    def observe(self, seconds: float, *, num_rows: int, num_prefilled: int) -> None:
        """A step took this long, from when the device began with it."""
        if num_prefilled == 0:
            self.decode_s = _blend(self.decode_s, seconds)
            return
        if num_rows == 0 and num_prefilled < _SMALLEST:
            return  # the price of a pass, not of its tokens
        own = seconds - (self.decode_s or 0.0) if num_rows else seconds
        if own > 0.1 * seconds:  # else the rows took longer before than now, and nothing can be said of the prompt
            self.prefill_s = _blend(self.prefill_s, own / num_prefilled)
        self._last = num_prefilled


def _blend(old: float | None, new: float) -> float:
    """What takes longer than was thought is believed sooner."""
    if old is None:
        return new
    weight = _SLOWER if new > old else _NEWEST
    return (1 - weight) * old + weight * new
