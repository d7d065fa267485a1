"""A limit on how long code of a checkpoint's template may keep a worker's thread."""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TookTooLong(BaseException):
    """Not an `Exception`: who makes do with another way when one fails must not catch it."""


def within(limit_s: float, work: Callable[[], T]) -> T:
    """What `work` returns. Raises `TookTooLong` in the midst of it once `limit_s` has passed: Python code is interrupted between two
    of its instructions, other code at its end."""
    worker = threading.get_ident()
    lock = threading.Lock()
    is_over = was_interrupted = False

    def interrupt() -> None:
        nonlocal was_interrupted
        with lock:
            if not is_over:
                was_interrupted = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker), ctypes.py_object(TookTooLong))

    watch = threading.Timer(limit_s, interrupt)
    watch.daemon = True
    watch.start()
    try:
        result = work()
    finally:
        watch.cancel()
        with lock:
            is_over = True
    if was_interrupted:
        _wait_for_the_interruption()
    return result


def _wait_for_the_interruption() -> None:
    """It was asked for just as the work ended, and must not come later."""
    while True:
        time.sleep(0)
