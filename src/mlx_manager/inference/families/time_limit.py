"""A limit on how long code of a checkpoint's template may keep a worker's thread."""

import ctypes
import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TookTooLong(BaseException):
    """Not an `Exception`: who makes do with another way when one fails must not catch it."""


class _Watch:
    """Interrupts threads at their time. One thread for all of them: a timer each would cost more than most templates.

    Who takes an entry out of `_due` decides, by one operation that nothing interrupts: an interruption may arrive anywhere in the thread
    that it is for, and must not find it holding a lock."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[object, tuple[int, float]] = {}  # thread and time
        self._wakes_at = math.inf
        self._thread: threading.Thread | None = None

    def begin(self, limit_s: float) -> object:
        """Of the calling thread; what it returns is for `end`."""
        entry, due = object(), time.monotonic() + limit_s
        with self._changed:
            self._due[entry] = threading.get_ident(), due
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="time-limit", daemon=True)
                self._thread.start()
            elif due < self._wakes_at:
                self._changed.notify()
        return entry

    def end(self, entry: object) -> bool:
        """Whether an interruption was asked for; if not, none will be."""
        return self._due.pop(entry, None) is None

    def _run(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                for entry, (thread, due) in list(self._due.items()):
                    if due <= now and self._due.pop(entry, None) is not None:
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TookTooLong))
                self._wakes_at = min((due for _, due in list(self._due.values())), default=math.inf)
                self._changed.wait(None if math.isinf(self._wakes_at) else max(0.0, self._wakes_at - time.monotonic()))


_watch = _Watch()


def within(limit_s: float, work: Callable[[], T]) -> T:
    """What `work` returns. Raises `TookTooLong` in the midst of it once `limit_s` has passed: Python code is interrupted between two
    of its instructions, other code at its end."""
    entry = _watch.begin(limit_s)
    was_interrupted = True
    try:
        result = work()
    finally:
        was_interrupted = _watch.end(entry)
    while was_interrupted:  # it was asked for just as the work ended, and must not come later
        time.sleep(0)
    return result
