"""Code that goes on for too long is interrupted where it is, and nowhere else."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_manager.inference.families.time_limit import TookTooLong, within


def spin(for_s: float) -> int:
    began = time.monotonic()
    count = 0
    while time.monotonic() - began < for_s:
        count += 1
    return count


def test_what_is_in_time_returns_what_it_returns_or_raises() -> None:
    assert within(10, lambda: 7) == 7
    with pytest.raises(ValueError, match="its own"):
        within(10, lambda: int("its own"))


def test_what_takes_too_long_is_interrupted_even_where_it_catches_exceptions() -> None:
    def stubborn() -> None:
        while True:
            try:
                spin(100)
            except Exception:  # noqa: BLE001 - as templates' callers do
                continue

    began = time.monotonic()
    with pytest.raises(TookTooLong):
        within(0.1, stubborn)
    assert time.monotonic() - began < 50


def test_an_interruption_never_comes_after_its_work() -> None:
    """Whatever the moment in which the limit falls, beside others who do the same."""

    def many(_: int) -> int:
        interrupted = 0
        for i in range(60):
            try:
                within(0.002, lambda: spin(0.0015 + 0.0001 * (i % 10)))  # noqa: B023 - it runs at once
            except TookTooLong:
                interrupted += 1
            spin(0.001)
        return interrupted

    with ThreadPoolExecutor(3) as pool:
        counts = list(pool.map(many, range(3)))
    assert all(0 <= count <= 60 for count in counts)
    assert threading.active_count() < 50
