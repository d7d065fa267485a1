"""The side that asks."""

import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType

from mlx_manager.confined.messages import PID, TIME_LIMIT, WALL_FACTOR, received, send
from mlx_manager.core.errors import Overloaded

log = logging.getLogger(__name__)

# What takes longer goes on behind others, and what takes very long in a few places.
_YIELDS_AFTER_S, _NICENESS = 0.1, 5
_LONG_S, _NUM_LONG = 1.0, 8
_START_S = 60.0
# What a busy machine takes to end a process.
_GRACE_S = 2.0


class Confined:
    """A process that does one thing, each piece of it under limits. It is there from the start, or with `lazy` from the first piece, until
    this object or the interpreter ends. Any thread."""

    def __init__(self, program: ModuleType, first_message: bytes = b"", *, lazy: bool = False) -> None:
        """`program` serves (`child.serve`), and prepares itself with `first_message`. Raises `Overloaded` if it does not start."""
        self._program = program.__name__
        self._first_message = first_message
        self._starting = threading.Lock()
        self._process = None if lazy else _Process(self._program, first_message)
        self._places = threading.BoundedSemaphore(_NUM_LONG)

    def done(self, piece: bytes, limit_s: float) -> bytes | None:
        """What became of a piece of work; None if it reached a limit. `limit_s` is of the processor, `WALL_FACTOR` as much of the clock.
        Raises `Overloaded`."""
        for _ in range(2):  # the process may have ended, having had nothing to do
            process = self._running()
            fork = process.fork(limit_s)
            if fork is not None:
                with fork.connection:
                    return self._answer(fork, piece, limit_s)
            with self._starting:
                if self._process is process:
                    self._process = None
        raise _unusable(self._program, "it ended as it began")

    def _answer(self, fork: "_Fork", piece: bytes, limit_s: float) -> bytes | None:
        try:
            send(fork.connection, piece)
            if not _answers(fork, _YIELDS_AFTER_S):
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, fork.pid, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)
                if not _answers(fork, _LONG_S):
                    self._wait_long(fork, limit_s)
            fork.connection.settimeout(_GRACE_S)
            return received(fork.connection)
        except (OSError, struct.error):
            return None

    def _wait_long(self, fork: "_Fork", limit_s: float) -> None:
        if not self._places.acquire(blocking=False):
            with suppress(ProcessLookupError):
                os.kill(fork.pid, signal.SIGKILL)
            raise Overloaded("Too much that takes long is being looked at already.", retry_after_s=3)
        try:
            _answers(fork, WALL_FACTOR * limit_s + _GRACE_S)
        finally:
            self._places.release()

    def _running(self) -> "_Process":
        with self._starting:
            if self._process is None:
                self._process = _Process(self._program, self._first_message)
            return self._process


@dataclass(frozen=True, slots=True)
class _Fork:
    pid: int
    connection: socket.socket


class _Process:
    """Ends when nobody has it any more."""

    def __init__(self, program: str, first_message: bytes) -> None:
        """Raises `Overloaded` if it does not start."""
        self._control, theirs = socket.socketpair()
        self._control.settimeout(_START_S)
        try:
            with theirs:
                # In a group of its own: a terminal's signals are for the server.
                command = [sys.executable, "-P", "-m", program]
                process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, process_group=0)
        except OSError as error:
            self._control.close()
            raise _unusable(program, error) from None
        end = weakref.finalize(self, _end, process, self._control)
        try:
            send(self._control, first_message)
        except OSError as error:
            end()
            raise _unusable(program, error) from None

    def fork(self, limit_s: float) -> _Fork | None:
        """One that waits for its piece of work; None if there is no process any more."""
        ours, theirs = socket.socketpair()
        ours.settimeout(_START_S)
        try:
            with theirs:
                socket.send_fds(self._control, [b"+"], [theirs.fileno()])
            ours.sendall(TIME_LIMIT.pack(limit_s))
            (pid,) = PID.unpack(ours.recv(PID.size, socket.MSG_WAITALL))
            return _Fork(pid, ours)
        except (OSError, struct.error):
            ours.close()
            return None


def _answers(fork: _Fork, within_s: float) -> bool:
    """Whether it has answered, or ended without a word."""
    fork.connection.settimeout(within_s)
    try:
        fork.connection.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return False
    return True


def _end(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    control.close()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with all its forks
    process.wait()


def _unusable(program: str, why: object) -> Overloaded:
    log.error("the process %s cannot be used: %s", program, why)
    return Overloaded("A part of this server does not start just now.", retry_after_s=5)
