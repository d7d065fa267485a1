"""The process itself, as `process` starts it; its input is a socket.

Each piece of work is done in a fork, under limits that the kernel keeps: when its time or memory is up the fork is gone, whatever it is
doing. So that it may fork, and is there at once, a program that serves has one thread and imports little.
"""

import gc
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable

from mlx_manager.confined.messages import PID, TIME_LIMIT, WALL_FACTOR, received, send

Work = Callable[[bytes], bytes]
# Without work for so long the process ends; the next piece starts another.
_IDLE_S = 600.0
_GO = b"+"


def serve(prepare: Callable[[bytes], Work], *, memory_bytes: int) -> None:
    """Does what it is sent until nobody is left to send anything. `prepare` makes of the first message what does the work, once for all
    forks. `memory_bytes` is what one may take beyond what is there already; on Linux only, where such a limit is kept."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # meant for the server, which goes on for a while; its end is ours
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(fileno=0) as control:
        work = prepare(received(control))
        gc.freeze()  # a fork that looked through all this would copy it
        control.settimeout(_IDLE_S)
        while _fork_and_wait(control, work, memory_bytes):
            pass


def _fork_and_wait(control: socket.socket, work: Work, memory_bytes: int) -> bool:
    """Forks ahead of the next piece of work, because that takes milliseconds where there is much memory; returns once the fork has one.
    False: nobody wants anything any more."""
    begun, begin = os.pipe()
    if os.fork() == 0:
        job = _next_job(control)
        if job is not None:
            os.write(begin, _GO)
            os.close(begin)
            control.close()
            _do_and_exit(job, work, memory_bytes)
        os._exit(0)
    os.close(begin)
    with open(begun, "rb") as waits:
        return waits.read(1) == _GO


def _next_job(control: socket.socket) -> socket.socket | None:
    """A connection with one piece of work; None once nobody wants anything any more."""
    try:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
    except OSError:
        return None
    return socket.socket(fileno=descriptors[0]) if descriptors else None


def _do_and_exit(job: socket.socket, work: Work, memory_bytes: int) -> None:
    """If it answers nothing, a limit was reached."""
    try:
        (limit_s,) = TIME_LIMIT.unpack(job.recv(TIME_LIMIT.size, socket.MSG_WAITALL))
        signal.setitimer(signal.ITIMER_PROF, limit_s)  # the signals of both end the process
        signal.setitimer(signal.ITIMER_REAL, limit_s * WALL_FACTOR)
        job.sendall(PID.pack(os.getpid()))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what it has to say when it dies is nobody's
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":
            with open("/proc/self/statm", encoding="ascii") as sizes:
                limit = int(sizes.read().split()[0]) * resource.getpagesize() + memory_bytes
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        send(job, work(received(job)))
    except (OSError, struct.error, MemoryError):  # whoever asked has gone, or a limit was reached
        pass
    finally:
        os._exit(0)
