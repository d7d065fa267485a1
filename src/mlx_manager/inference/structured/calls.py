"""Tool calls as grammars, in each format's own spelling: the other direction of `families.tool_formats`."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mlx_manager.core.requests import Grammar, Regex, ToolSpec
from mlx_manager.inference.families.family import Family
from mlx_manager.inference.families.tool_formats import json_tags, llama_json, marked_pythonic, mistral, pythonic
from mlx_manager.inference.families.tool_formats.braced import FUNCTION_GEMMA, GEMMA4, BracedCalls
from mlx_manager.inference.families.tool_formats.marked import DEEPSEEK, KIMI
from mlx_manager.inference.families.tool_formats.tagged import ARG_TAGS, DSML, FUNCTION_NAMES, FUNCTION_TAGS, LONGCAT, MINIMAX
from mlx_manager.inference.structured.compiler import json_rule, literal

MarkOf = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """Rules in Lark's notation. `section` is one section of calls with its marks, `rest` what follows `opening` in it; `opening` is ""
    where calls have no mark. `separator` stands between sections; None: there is but one."""

    rules: tuple[str, ...]
    opening: str
    section: str
    rest: str
    separator: str | None = None

    def required(self, *, once: bool) -> str:
        """A reply that is calls and nothing else."""
        more = "" if once or self.separator is None else f" ({literal(self.separator)} section)*"
        return self._lark(f"start: section{more}", f"section: {self.section}")

    def after_opening(self) -> str:
        """What follows the mark that opened a section."""
        return self._lark(f"start: {self.rest}")

    def or_text(self, *, once: bool) -> str:
        """For a format without a mark: text that does not begin as a call would, or calls."""
        more = "" if once or self.separator is None else f" ({literal(self.separator)} section)*"
        return self._lark(f"start: TEXT | section{more}", "TEXT: /[^{\\[<`](.|\\n)*/", f"section: {self.section}")

    def _lark(self, *first: str) -> str:
        return "\n".join((*first, *self.rules))


def call_grammar(
    family: Family, tools: Sequence[ToolSpec], mark: MarkOf, *, template: str, vocabulary: Mapping[str, int], once: bool
) -> CallGrammar | None:
    """The calls of these tools (one at least), or None for a family whose calls cannot be told as a grammar. `mark` spells a text of the
    model's own; `once`: one call at most."""
    if family.channels:
        return _channels(tools, mark)
    match family.tool_format:
        case _ if family.tool_format is json_tags:
            rest = f'"\\n" call "\\n" {mark(json_tags.end)}'
            return _sections(json_tags.start, rest, _objects(tools, "arguments"), mark, "\n")
        case _ if family.tool_format is llama_json:
            return CallGrammar(_objects(tools, "parameters"), "", "call", "call", "; ")
        case _ if family.tool_format is mistral and "[ARGS]" in vocabulary:
            return _sections(mistral.start, "call", _each(tools, lambda tool: f"{literal(tool.name)} {mark('[ARGS]')}"), mark, "")
        case _ if family.tool_format is mistral:
            more = "" if once else ' (", " call)*'
            return _sections(mistral.start, f'" "? "[" call{more} "]"', _objects(tools, "arguments"), mark)
        case _ if family.tool_format is pythonic:
            section = _python_list(once=once)
            return CallGrammar(_python_calls(tools), "", section, section)
        case _ if family.tool_format is marked_pythonic:
            return _sections(marked_pythonic.start, f"{_python_list(once=once)} {mark(marked_pythonic.end)}", _python_calls(tools), mark)
        case _ if family.tool_format is DEEPSEEK:
            return _deepseek(tools, mark, in_fences="```json" in template, once=once)
        case _ if family.tool_format is KIMI:
            begin = mark("<|tool_call_argument_begin|>")
            rules = _each(tools, lambda tool: f"{literal(f'functions.{tool.name}:')} /[0-9]{{1,3}}/ {begin}")
            call = f"{mark('<|tool_call_begin|>')} call {mark('<|tool_call_end|>')}"
            return _sections(KIMI.start, f"{call}{'' if once else f' ({call})*'} {mark(KIMI.end)}", rules, mark)
        case BracedCalls() as braced if braced in (GEMMA4, FUNCTION_GEMMA):
            quote = '<|"|>' if braced is GEMMA4 else "<escape>"
            return _sections(braced.start, f"call {mark(braced.end)}", _braced_calls(tools, mark(quote)), mark, "")
        case _:
            tagged = next((s for s in _TAGGED if s.its is family.tool_format), None)
            return None if tagged is None else tagged.grammar(tools, mark)


def _sections(opening: str, rest: str, rules: tuple[str, ...], mark: MarkOf, separator: str | None = None) -> CallGrammar:
    return CallGrammar(rules, opening, f"{mark(opening)} {rest}", rest, separator)


# ---- arguments as JSON


def _each(tools: Sequence[ToolSpec], head: Callable[[ToolSpec], str], tail: str = "") -> tuple[str, ...]:
    """`call`: for each tool what leads to its arguments, the arguments as JSON, and what follows them."""
    rules = [f"call: {_alternatives(len(tools))}"]
    for i, tool in enumerate(tools):
        rules += [f"call{i}: {head(tool)} args{i} {tail}", f"args{i}: {_arguments(tool)}"]
    return tuple(rules)


def _objects(tools: Sequence[ToolSpec], arguments: str) -> tuple[str, ...]:
    """`call`: `{"name": …, "arguments": {…}}` of any of the tools."""
    return _each(tools, lambda tool: literal(f'{{"name": {literal(tool.name)}, {literal(arguments)}: '), '"}"')


def _deepseek(tools: Sequence[ToolSpec], mark: MarkOf, *, in_fences: bool, once: bool) -> CallGrammar:
    separator = mark("<｜tool▁sep｜>")
    if in_fences:
        rules = _each(tools, lambda tool: f'"function" {separator} {literal(tool.name)} "\\n```json\\n"', '"\\n```"')
    else:
        rules = _each(tools, lambda tool: f"{literal(tool.name)} {separator}")
    call = f"{mark('<｜tool▁call▁begin｜>')} call {mark('<｜tool▁call▁end｜>')}"
    more = "" if once else f' ("\\n"? {call})*'
    return _sections(DEEPSEEK.start, f"{call}{more} {mark(DEEPSEEK.end)}", rules, mark)


def _channels(tools: Sequence[ToolSpec], mark: MarkOf) -> CallGrammar:
    """A message on the channel for calls; what ends it ends the reply."""
    head = f'{mark("<|channel|>")} "commentary to=functions."'
    rules = _each(tools, lambda tool: f'{literal(tool.name)} " " {mark("<|constrain|>")} "json" {mark("<|message|>")}')
    return CallGrammar(rules, "", f"{head} call", f"{head} call")


def _arguments(tool: ToolSpec) -> str:
    schema = dict(_parameters(tool)) or {"type": "object", "properties": {}, "additionalProperties": False}
    return json_rule({"type": "object", **schema}, strict=tool.strict)


# ---- arguments between tags


@dataclass(frozen=True, slots=True)
class _Tagged:
    """How `its` format is written: before a call's parameters ({name}), around each key ({key}; {is_text} where it has to say so), and
    after the last. A text in `marks` is the model's own. `separator` stands between sections."""

    its: object
    head: str
    key: str
    value_end: str
    tail: str
    marks: tuple[str, ...]
    separator: str = "\n"

    def grammar(self, tools: Sequence[ToolSpec], mark: MarkOf) -> CallGrammar:
        its: Any = self.its
        end = next((m for m in self.marks if m in self.value_end), "")
        # No text matches a special token; where the end of a value is plain text, its first character ends it.
        any_character = "(.|\\n)" if end and mark(end).startswith("<[") else f"[^{self.value_end.strip()[0]}]"
        rules = [f"call: {_alternatives(len(tools))}"]
        for i, tool in enumerate(tools):
            pairs: list[str] = []
            for j, (name, schema, is_required) in enumerate(_properties(tool)):
                bare = _bare(schema, any_character)
                if tool.form is not None:
                    bare, more = _plain_text(tool.form, f"TEXT{i}_{j}", any_character)
                    rules += more
                rules.append(f"value{i}_{j}: {bare or json_rule(schema, strict=tool.strict)}")
                key = self.key.format(key=name, is_text="false" if bare is None else "true")
                pair = f"{self._spelt(key, mark)} value{i}_{j} {self._spelt(self.value_end, mark)}"
                pairs.append(pair if is_required else f"({pair})?")
            rules.append(f"call{i}: {self._spelt(self.head.format(name=tool.name), mark)} {' '.join(pairs)}")
        return _sections(its.start, f"call {self._spelt(self.tail, mark)}", tuple(rules), mark, self.separator)

    def _spelt(self, text: str, mark: MarkOf) -> str:
        """Text with marks in it, as a grammar has it."""
        for found in self.marks:
            before, is_there, after = text.partition(found)
            if is_there:
                return " ".join(part for part in (self._spelt(before, mark), mark(found), self._spelt(after, mark)) if part)
        return literal(text) if text else ""


def _arg_tags(its: Any, prefix: str) -> _Tagged:
    key, value = f"{prefix}arg_key>", f"{prefix}arg_value>"
    return _Tagged(
        its,
        head="{name}\n",
        key=f"<{key}{{key}}</{key}\n<{value}",
        value_end=f"</{value}\n",
        tail=its.end,
        marks=(f"<{key}", f"</{key}", f"<{value}", f"</{value}", its.end),
    )


_TAGGED = (
    _arg_tags(ARG_TAGS, ""),
    _arg_tags(LONGCAT, "longcat_"),
    _Tagged(
        FUNCTION_TAGS,
        head="\n<function={name}>\n",
        key="<parameter={key}>\n",
        value_end="\n</parameter>\n",
        tail=f"</function>\n{FUNCTION_TAGS.end}",
        marks=(FUNCTION_TAGS.end,),
    ),
    _Tagged(
        MINIMAX,
        head='\n<invoke name="{name}">\n',
        key='<parameter name="{key}">',
        value_end="</parameter>\n",
        tail=f"</invoke>\n{MINIMAX.end}",
        marks=(MINIMAX.end,),
    ),
    _Tagged(
        DSML,
        head='\n<｜DSML｜invoke name="{name}">\n',
        key='<｜DSML｜parameter name="{key}" string="{is_text}">',
        value_end="</｜DSML｜parameter>\n",
        tail=f"</｜DSML｜invoke>\n{DSML.end}",
        marks=("｜DSML｜",),
    ),
    _Tagged(FUNCTION_NAMES, head='"{name}">', key='<param name="{key}">', value_end="</param>", tail=FUNCTION_NAMES.end, marks=()),
)


def _bare(schema: Mapping[str, Any], any_character: str) -> str | None:
    """A string without its quotes; None for what is no string, or has to match more than a length."""
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(choices, list) and all(isinstance(c, str) for c in cast(list[object], choices)):
        return " | ".join(literal(c) for c in cast(list[str], choices))
    if schema.get("type") != "string" or not schema.keys() <= _BARE_KEYWORDS:
        return None
    longest = schema.get("maxLength")
    return f"/{any_character}{{{schema.get('minLength', 0)},{'' if longest is None else longest}}}/"


_BARE_KEYWORDS = frozenset({"type", "title", "description", "default", "examples", "minLength", "maxLength"})


# ---- arguments as Python writes them, and in braces


def _python_list(*, once: bool) -> str:
    return '"[" call "]"' if once else '"[" call (", " call)* "]"'


def _python_calls(tools: Sequence[ToolSpec]) -> tuple[str, ...]:
    rules = [f"call: {_alternatives(len(tools))}"]
    for i, tool in enumerate(tools):
        properties = _properties(tool)
        for j, (name, schema, _) in enumerate(properties):
            value = '"True" | "False"' if schema.get("type") == "boolean" else json_rule(schema, strict=tool.strict)
            rules += [f"arg{i}_{j}: {literal(name + '=')} value{i}_{j}", f"value{i}_{j}: {value}"]
        given = _in_order([f"arg{i}_{j}" for j in range(len(properties))], [required for _, _, required in properties], ", ")
        rules.append(f'call{i}: {literal(tool.name + "(")} ({given}) ")"')
    return tuple(rules)


def _braced_calls(tools: Sequence[ToolSpec], quote: str) -> tuple[str, ...]:
    any_character = "(.|\\n)" if quote.startswith("<[") else "[^<]"
    rules = [f"call: {_alternatives(len(tools))}"]
    for i, tool in enumerate(tools):
        arguments = _braced({"type": "object", **_parameters(tool)}, quote, any_character, tool.strict)
        rules.append(f"call{i}: {literal('call:' + tool.name)} {arguments}")
    return tuple(rules)


def _braced(schema: Mapping[str, Any], quote: str, any_character: str, strict: bool) -> str:
    """A value: bare keys, and text in quotation marks of the model's own."""
    bare = _bare(schema, any_character)
    if bare is not None:
        return f"{quote} ({bare}) {quote}"
    items: object = schema.get("items")
    if schema.get("type") == "array" and isinstance(items, Mapping):
        item = _braced(cast(Mapping[str, Any], items), quote, any_character, strict)
        longest = schema.get("maxItems")
        more = f'("," {item}){{0,{"" if longest is None else max(0, longest - 1)}}}'
        return f'"[" ({item} {more}) "]"' if schema.get("minItems") else f'"[" ({item} {more})? "]"'
    if schema.get("type") == "object":
        properties = _members(schema)
        pairs = [f"{literal(name + ':')} {_braced(inner, quote, any_character, strict)}" for name, inner, _ in properties]
        return f'"{{" ({_in_order(pairs, [required for _, _, required in properties], ",")}) "}}"'
    return json_rule(schema, strict=strict)  # numbers and the like are written as in JSON


def _in_order(names: Sequence[str], required: Sequence[bool], comma: str) -> str:
    """`names` in this order with commas between, those that are not required there or not."""
    if not names:
        return '""'
    tail = "".join(f" {literal(comma)} {n}" if r else f" ({literal(comma)} {n})?" for n, r in zip(names[1:], required[1:], strict=True))
    here = f"{names[0]}{tail}"
    return here if required[0] else f"{here} | {_in_order(names[1:], required[1:], comma)}"


def _alternatives(count: int) -> str:
    return " | ".join(f"call{i}" for i in range(count))


def _properties(tool: ToolSpec) -> list[tuple[str, Mapping[str, Any], bool]]:
    return _members(_parameters(tool))


def _parameters(tool: ToolSpec) -> Mapping[str, Any]:
    """The schema of the arguments, with what a regular expression asks of the text that they are. What a grammar asks of it cannot be
    said of a text in quotation marks, with its escapes."""
    match tool.form:
        case Regex(pattern):
            ((name, schema, _),) = _members(tool.parameters)
            return {**tool.parameters, "properties": {name: {**schema, "pattern": f"^(?:{pattern})$"}}}
        case Grammar() | None:
            return tool.parameters


def has_enforceable_form(tool: ToolSpec, family: Family) -> bool:
    match tool.form:
        case Grammar():
            return any(spelling.its is family.tool_format for spelling in _TAGGED)
        case Regex():
            return True
        case None:
            return False


def _plain_text(form: Regex | Grammar, terminal: str, any_character: str) -> tuple[str, tuple[str, ...]]:
    """A text without quotation marks, and the rules that it needs. What ends it is not in it."""
    match form:
        case Regex(pattern):
            return terminal, (f"{terminal}: /(?:{_in_slashes(pattern)})/ & /{any_character}*/",)
        case Grammar(lark):
            return f"%lark {{\n{lark}\n}}", ()


def _in_slashes(pattern: str) -> str:
    escaped = re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], pattern, flags=re.DOTALL)
    return escaped.replace("\n", r"\n")


def _members(schema: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], bool]]:
    """Name, schema and whether it must be given, of each property."""
    properties: object = schema.get("properties")
    required: object = schema.get("required")
    needed = set(cast(list[str], required)) if isinstance(required, list) else set[str]()
    if not isinstance(properties, Mapping):
        return []
    entries = cast(Mapping[str, object], properties).items()
    return [(name, cast(Mapping[str, Any], inner) if isinstance(inner, Mapping) else {}, name in needed) for name, inner in entries]
