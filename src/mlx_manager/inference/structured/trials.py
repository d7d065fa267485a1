"""Whether a grammar can be compiled in time, found out where it does no harm: in a process that can be ended."""

import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from mlx_manager.core.errors import Overloaded
from mlx_manager.inference.structured import trial_process
from mlx_manager.inference.structured.trial_messages import MAX_ANSWER_BYTES, PID, TIME_LIMIT, WALL_FACTOR, send

log = logging.getLogger(__name__)

# Of the processor; as much of the clock and a quarter more, for a busy machine.
LIMIT_S = 2.0
TOO_LONG = f"it takes more than {LIMIT_S:g} seconds, or too much memory, to compile"
# A form that may be compiled takes milliseconds. What takes longer goes on behind others, and what takes very long in a few places.
_YIELDS_AFTER_S, _NICENESS = 0.1, 5
_LONG_S, _NUM_LONG = 1.0, 8
_START_S = 60.0
# What a busy machine takes to end a process.
_GRACE_S = 2.0


class Trials:
    """Of one vocabulary. The process is there until this object or the interpreter ends. Any thread."""

    def __init__(self, tokenizer: str, *, vocab_size: int, stop_tokens: Sequence[int]) -> None:
        """`tokenizer` as its library writes it. The process gets ready on its own. Raises `Overloaded` if it does not start."""
        self._vocabulary = json.dumps({"tokenizer": tokenizer, "vocab_size": vocab_size, "stop_tokens": list(stop_tokens)}).encode()
        self._starting = threading.Lock()
        self._process: _Process | None = _Process(self._vocabulary)
        self._places = threading.BoundedSemaphore(_NUM_LONG)

    def error(self, grammar: str, limit_s: float = LIMIT_S) -> str:
        """What is wrong with a grammar; empty if it may be compiled. Raises `Overloaded`."""
        for _ in range(2):  # the process may have ended, having had nothing to do
            process = self._running()
            fork = process.fork(limit_s)
            if fork is not None:
                with fork.connection:
                    return self._answer(fork, grammar, limit_s)
            with self._starting:
                if self._process is process:
                    self._process = None
        raise _unusable("it ended as it began")

    def _answer(self, fork: "_Fork", grammar: str, limit_s: float) -> str:
        """What the fork says. If it ends without a word it has reached a limit."""
        try:
            send(fork.connection, grammar.encode())
            said = _said(fork, _YIELDS_AFTER_S)
            if said is None:
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, fork.pid, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)
                said = _said(fork, _LONG_S)
            if said is None:
                said = self._said_at_length(fork, limit_s)
        except OSError:
            return TOO_LONG
        return said[1:].decode(errors="replace") if said else TOO_LONG

    def _said_at_length(self, fork: "_Fork", limit_s: float) -> bytes | None:
        if not self._places.acquire(blocking=False):
            with suppress(ProcessLookupError):
                os.kill(fork.pid, signal.SIGKILL)
            raise Overloaded("Too many forms that take long are being compiled already.", retry_after_s=int(LIMIT_S) + 1)
        try:
            return _said(fork, WALL_FACTOR * limit_s + _GRACE_S)
        finally:
            self._places.release()

    def _running(self) -> "_Process":
        with self._starting:
            if self._process is None:
                self._process = _Process(self._vocabulary)
            return self._process


@dataclass(frozen=True, slots=True)
class _Fork:
    pid: int
    connection: socket.socket


class _Process:
    """Ends when nobody has it any more."""

    def __init__(self, vocabulary: bytes) -> None:
        """Raises `Overloaded` if it does not start."""
        self._control, theirs = socket.socketpair()
        self._control.settimeout(_START_S)
        try:
            with theirs:
                # In a group of its own: a terminal's signals are for the server.
                command = [sys.executable, "-P", "-m", trial_process.__name__]
                process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, process_group=0)
        except OSError as error:
            self._control.close()
            raise _unusable(error) from None
        end = weakref.finalize(self, _end, process, self._control)
        try:
            send(self._control, vocabulary)
        except OSError as error:
            end()
            raise _unusable(error) from None

    def fork(self, limit_s: float) -> _Fork | None:
        """One that waits for a grammar; None if there is no process any more."""
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


def _said(fork: _Fork, within_s: float) -> bytes | None:
    """Empty if it ended without a word; None if it goes on."""
    fork.connection.settimeout(within_s)
    try:
        return fork.connection.recv(1 + MAX_ANSWER_BYTES)
    except TimeoutError:
        return None


def _end(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    control.close()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with all its forks
    process.wait()


def _unusable(why: object) -> Overloaded:
    log.error("the process that tries forms cannot be used: %s", why)
    return Overloaded("Forms cannot be compiled just now.", retry_after_s=5)
