"""The program that tries grammars: compiles each, and makes the masks of its first few tokens. Imports nothing but the compiler."""

import json
import time
from collections.abc import Sequence
from functools import partial

from llguidance import LLMatcher, LLTokenizer

from mlx_manager.confined.child import Work, serve

_NUM_TRIED = 8
# Of the processor, for a token after the first: others wait for it at each step.
_MAX_MASK_S = 0.025
_MEMORY_BYTES = 512 << 20
_MAX_ERROR_BYTES = 4 << 10
_WARM_UP = LLMatcher.grammar_from_json_schema({"type": "object"})


def _prepared(message: bytes) -> Work:
    vocabulary = json.loads(message)
    stop_tokens = vocabulary["stop_tokens"]
    tokens = LLTokenizer(vocabulary["tokenizer"], n_vocab=vocabulary["vocab_size"], eos_token=stop_tokens)
    _error(_WARM_UP, tokens, stop_tokens)  # what is made once is made here and not in every fork, the allocator's order among it
    return partial(_tried, tokens, stop_tokens)


def _tried(tokens: LLTokenizer, stop_tokens: Sequence[int], grammar: bytes) -> bytes:
    return _error(grammar.decode(), tokens, stop_tokens).encode()[:_MAX_ERROR_BYTES]


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
    serve(_prepared, memory_bytes=_MEMORY_BYTES)
