"""The process in which grammars are tried, as `trials` starts it; its input is a socket.

A native call cannot be stopped from inside its thread. So each grammar is compiled in a fork of this process first, under limits that the
kernel keeps: when its time or memory is up the fork is gone, whatever it is doing. Nothing is imported but the compiler, so that the
process is there at once; and it has one thread, as what forks must.
"""

import gc
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence

from llguidance import LLMatcher, LLTokenizer

from mlx_manager.inference.structured.trial_messages import FAILED, MAX_ANSWER_BYTES, PASSED, PID, TIME_LIMIT, WALL_FACTOR, received

# Without a grammar to try for so long the process ends; the next one starts another.
_IDLE_S = 600.0
_NUM_TRIED = 8
# Of the processor, for a token after the first: others wait for it at each step.
_MAX_MASK_S = 0.025
# What a grammar may take of memory beyond what is there already; on Linux only, where such a limit is kept.
_MEMORY_BYTES = 512 << 20
_WARM_UP = LLMatcher.grammar_from_json_schema({"type": "object"})
_PAGE_BYTES = resource.getpagesize()


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM):  # meant for the server, which goes on for a while; its end is ours
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(fileno=0) as control:
        vocabulary = json.loads(received(control))
        tokens = LLTokenizer(vocabulary["tokenizer"], n_vocab=vocabulary["vocab_size"], eos_token=vocabulary["stop_tokens"])
        stop_tokens = vocabulary["stop_tokens"]
        del vocabulary
        _error(_WARM_UP, tokens, stop_tokens)  # what is made once is made here and not in every fork, the allocator's order among it
        gc.disable()
        control.settimeout(_IDLE_S)
        while _fork_and_wait(control, tokens, stop_tokens):
            pass


def _fork_and_wait(control: socket.socket, tokens: LLTokenizer, stop_tokens: Sequence[int]) -> bool:
    """Forks ahead of the next grammar, because that takes milliseconds where the vocabulary is large; returns once the fork has one.
    False: nobody wants anything any more."""
    begun, begin = os.pipe()
    if os.fork() == 0:
        job = _next_job(control)
        if job is not None:
            os.write(begin, PASSED)
            os.close(begin)
            control.close()
            _try_and_exit(job, tokens, stop_tokens)
        os._exit(0)
    os.close(begin)
    with open(begun, "rb") as waits:
        return waits.read(1) == PASSED


def _next_job(control: socket.socket) -> socket.socket | None:
    """A connection with one grammar; None once nobody wants anything any more."""
    try:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
    except OSError:
        return None
    return socket.socket(fileno=descriptors[0]) if descriptors else None


def _try_and_exit(job: socket.socket, tokens: LLTokenizer, stop_tokens: Sequence[int]) -> None:
    """In a process of its own. What it says is how it went; if it says nothing, a limit was reached."""
    try:
        (limit_s,) = TIME_LIMIT.unpack(job.recv(TIME_LIMIT.size, socket.MSG_WAITALL))
        signal.setitimer(signal.ITIMER_PROF, limit_s)  # the signals of both end the process
        signal.setitimer(signal.ITIMER_REAL, limit_s * WALL_FACTOR)
        job.sendall(PID.pack(os.getpid()))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what the compiler has to say when it dies is nobody's
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":
            with open("/proc/self/statm", encoding="ascii") as sizes:
                limit = int(sizes.read().split()[0]) * _PAGE_BYTES + _MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        error = _error(received(job).decode(), tokens, stop_tokens)
        job.sendall(FAILED + error.encode()[:MAX_ANSWER_BYTES] if error else PASSED)
    except (OSError, struct.error):  # whoever asked has gone
        pass
    finally:
        os._exit(0)


def _error(grammar: str, tokens: LLTokenizer, stop_tokens: Sequence[int]) -> str:
    """What is wrong with a grammar, if anything is. Some prove too large only at the first few tokens, and some at none, but keep
    everybody waiting at each."""
    matcher = LLMatcher(tokens, grammar, log_level=0)
    began = 0.0
    for tried in range(_NUM_TRIED):
        if tried == 1:
            began = time.process_time()
        mask = matcher.compute_bitmask()
        token = _one_of(mask, stop_tokens)
        if token is None or matcher.is_error() or matcher.is_stopped():
            return matcher.get_error()
        matcher.consume_token(token)
    if (time.process_time() - began) / (_NUM_TRIED - 1) > _MAX_MASK_S:
        return "it is too complex: each token of a reply would keep all others waiting"
    return matcher.get_error()


def _one_of(mask: bytes, stop_tokens: Sequence[int]) -> int | None:
    """An allowed token that ends nothing, from the middle of the vocabulary if there is one."""
    allowed = int.from_bytes(mask, "little")
    for token in stop_tokens:
        allowed &= ~(1 << token)
    half = len(mask) * 4
    upper = allowed >> half
    if upper:
        return half + (upper & -upper).bit_length() - 1
    return (allowed & -allowed).bit_length() - 1 if allowed else None


if __name__ == "__main__":
    main()
