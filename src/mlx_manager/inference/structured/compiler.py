"""Grammar → matcher, for one tokenizer. Compiling takes milliseconds to seconds: never on the device thread or the event loop. What would
take longer is found out in `trials`."""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, cast

from llguidance import LLMatcher, LLTokenizer

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.requests import AnyJson, Grammar, JsonSchema, OneOf, OutputFormat, Regex
from mlx_manager.inference.structured.trials import LIMIT_S, Trials

# As Python writes JSON, and most templates with it: what the model has learnt, and nothing that could go on for ever.
JSON_STYLE: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_GRAMMAR_BYTES = 1 << 20
_CACHE_BYTES = 8 << 20
_MAX_MESSAGE_CHARS = 400
# Of the compiler's own words, those that say nothing to who wrote the schema.
_SAYS_NOTHING = {"NoExtensionBias": "nothing matches it", "NoExtension": "nothing matches it"}


class Compiler:
    """Keeps what it compiled lately, by the grammar's text. Any thread."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, stop_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_tokens = list(stop_tokens)
        self._lock = threading.Lock()
        self._ready: tuple[LLTokenizer, Trials] | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._compiled_bytes = 0

    def compile(self, grammar: str, field: str, *, limit_s: float = LIMIT_S) -> LLMatcher:
        """A matcher of its own at the grammar's beginning. Raises `InvalidField`, naming `field`, for a grammar that says nothing that
        could be matched, or too much, or that takes longer than `limit_s`; and `Overloaded`."""
        if len(grammar) > _MAX_GRAMMAR_BYTES:
            raise InvalidField(f"Invalid '{field}': it is too large to be enforced.", param=field)
        with self._lock:
            known = self._compiled.get(grammar)
            if known is not None:
                self._compiled.move_to_end(grammar)
                return known.deep_copy()
        tokens, trials = self._vocabulary()
        error = trials.error(grammar, limit_s)
        if error:
            raise InvalidField(f"Invalid '{field}': {_reason(error)}.", param=field)
        matcher = LLMatcher(tokens, grammar, log_level=0)
        matcher.compute_bitmask()  # what the first one takes longer than others is not for the device thread
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
        return f"<[{token}]>" if token is not None and self._vocabulary()[0].is_special_token(token) else literal(text)

    def _vocabulary(self) -> tuple[LLTokenizer, Trials]:
        with self._lock:
            if self._ready is None:
                spelt = _spelt(self._tokenizer)
                trials = Trials(spelt, vocab_size=self._vocab_size, stop_tokens=self._stop_tokens)  # reads it while we do
                self._ready = LLTokenizer(spelt, n_vocab=self._vocab_size, eos_token=self._stop_tokens), trials
            return self._ready


def _spelt(tokenizer: Any) -> str:
    """A tokenizer as its library writes it, with all that was added to it."""
    backend = copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return backend.to_str()


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
    plain = _plain(schema)
    return LLMatcher.grammar_from_json_schema(plain, overrides=_options(plain, strict=strict))  # type: ignore[arg-type]


def json_rule(schema: Mapping[str, Any] | bool, *, strict: bool) -> str:
    """A schema as a part of a grammar in Lark's notation."""
    plain = _plain(schema)
    options = {"x-guidance": _options(plain, strict=strict)}
    return "%json " + json.dumps({**plain, **options} if isinstance(plain, dict) else options)


def _options(schema: object, *, strict: bool) -> dict[str, Any]:
    return {**JSON_STYLE, "lenient": not strict, "coerce_one_of": not strict or _can_merge_one_of(schema)}


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """The same JSON value made of what the JSON writer knows."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    return value


def _can_merge_one_of(schema: object) -> bool:
    """Whether no value fits two branches of a `oneOf`, so that `anyOf` says the same: they differ in type, or in a required constant."""
    left: list[object] = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            node = cast(dict[str, Any], value)
            branches = node.get("oneOf")
            if isinstance(branches, list) and not _are_disjoint(cast(list[object], branches)):
                return False
            left += node.values()
        elif isinstance(value, list):
            left += cast(list[object], value)
    return True


def _are_disjoint(branches: list[object]) -> bool:
    nodes = [cast(dict[str, Any], b) if isinstance(b, dict) else {} for b in branches]
    types = [node.get("type") for node in nodes]
    if all(isinstance(t, str) for t in types) and len(set(types)) == len(types) and not {"integer", "number"} <= set(types):
        return True
    constants = [_required_constants(node) for node in nodes]
    names = set[str]().union(*constants)
    return any(all(name in c for c in constants) and _differ([c[name] for c in constants]) for name in names)


def _required_constants(node: Mapping[str, Any]) -> dict[str, list[str]]:
    """Required properties that have one of a few values, as JSON."""
    properties: object = node.get("properties")
    required: object = node.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    values: dict[str, list[str]] = {}
    for name, inner in cast(dict[str, object], properties).items():
        if name in required and isinstance(inner, dict):
            limits = cast(dict[str, Any], inner)
            given: object = [limits["const"]] if "const" in limits else limits.get("enum")
            if isinstance(given, list):
                values[name] = [json.dumps(value) for value in cast(list[object], given)]
    return values


def _differ(sets: list[list[str]]) -> bool:
    return len(set[str]().union(*sets)) == sum(len(set(s)) for s in sets)


def _reason(error: str) -> str:
    """The compiler's own words on one line, without what it says of its own inside."""
    first = re.split(r"\n<state>|\n\s*at |\bnode:", error, maxsplit=1)[0]
    said = re.sub(r"\s+", " ", first).strip().rstrip(".")[:_MAX_MESSAGE_CHARS]
    if "oneOf" in said:
        return "'oneOf' can be enforced only where its branches differ in type or in a required constant: use 'anyOf'"
    return _SAYS_NOTHING.get(said, said) or "it cannot be enforced"
