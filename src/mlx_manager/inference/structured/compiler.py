"""Grammar → matcher, for one tokenizer. Compiling, and the first mask with it, takes milliseconds to seconds: never on the device thread
or the event loop."""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.requests import AnyJson, Grammar, JsonSchema, OneOf, OutputFormat, Regex

# As Python writes JSON, and most templates with it: what the model has learnt, and nothing that could go on for ever.
JSON_STYLE: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_GRAMMAR_BYTES = 1 << 20
_CACHE_BYTES = 8 << 20
_MAX_MESSAGE_CHARS = 400


class Compiler:
    """Keeps what it compiled lately, by the grammar's text. Any thread."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, stop_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_tokens = list(stop_tokens)
        self._lock = threading.Lock()
        self._ready: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._compiled_bytes = 0

    def compile(self, grammar: str, field: str) -> LLMatcher:
        """A matcher of its own at the grammar's beginning. Raises `InvalidField`, naming `field`, for a grammar that says nothing that
        could be matched, or too much."""
        if len(grammar) > _MAX_GRAMMAR_BYTES:
            raise InvalidField(f"Invalid '{field}': it is too large to be enforced.", param=field)
        with self._lock:
            known = self._compiled.get(grammar)
            if known is not None:
                self._compiled.move_to_end(grammar)
                return known.deep_copy()
        matcher = LLMatcher(self._tokens(), grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some grammars prove too large only here
        if matcher.is_error():
            raise InvalidField(f"Invalid '{field}': {_reason(matcher.get_error())}.", param=field)
        with self._lock:
            if grammar not in self._compiled:
                self._compiled[grammar] = matcher
                self._compiled_bytes += len(grammar)
            while self._compiled_bytes > _CACHE_BYTES:
                forgotten, _ = self._compiled.popitem(last=False)
                self._compiled_bytes -= len(forgotten)
        return matcher.deep_copy()

    def mark(self, text: str) -> str:
        """A text of the model's own, such as `<tool_call>`, as a grammar spells it: by its token where it is a special one, which no
        text matches."""
        token: int | None = self._tokenizer.get_vocab().get(text)
        return f"<[{token}]>" if token is not None and self._tokens().is_special_token(token) else literal(text)

    def _tokens(self) -> LLTokenizer:
        with self._lock:
            if self._ready is None:
                self._ready = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._stop_tokens)
            return self._ready


def grammar_of(output: OutputFormat) -> str:
    """The form that an answer must have, as a grammar."""
    match output:
        case AnyJson():
            return json_grammar({"type": "object"}, strict=True)
        case JsonSchema(schema, strict):
            return json_grammar(schema, strict=strict)
        case Regex(pattern):
            return LLMatcher.grammar_from_regex(pattern)
        case OneOf(texts):
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(literal, texts)))
        case Grammar(lark):
            return LLMatcher.grammar_from_lark(lark)


def json_grammar(schema: Mapping[str, Any] | bool, *, strict: bool) -> str:
    return LLMatcher.grammar_from_json_schema(_plain(schema), overrides={**JSON_STYLE, "lenient": not strict})  # type: ignore[arg-type]


def json_rule(schema: Mapping[str, Any] | bool, *, strict: bool) -> str:
    """A schema as a part of a grammar in Lark's notation."""
    options = {"x-guidance": {**JSON_STYLE, "lenient": not strict}}
    plain = _plain(schema)
    return "%json " + json.dumps({**plain, **options} if isinstance(plain, dict) else options)


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """The same JSON value made of what the JSON writer knows."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    return value


def _reason(error: str) -> str:
    """The compiler's own words on one line, without what it says of its own inside."""
    first = re.split(r"\n<state>|\n\s*at |\bnode:", error, maxsplit=1)[0]
    return re.sub(r"\s+", " ", first).strip().rstrip(".")[:_MAX_MESSAGE_CHARS] or "it cannot be enforced"
