"""Calls whose arguments come one by one between tags of their own; what a value means is for the tool's schema to say."""

import re
from collections.abc import Sequence
from typing import Literal

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import ArgumentStream, Call, Section
from mlx_manager.inference.families.marks import overlap
from mlx_manager.inference.families.tool_formats import json_tags
from mlx_manager.inference.families.tool_formats.parameters import TEXT_ONLY, json_string, json_value, types_of

_CDATA, _CDATA_END = "<![CDATA[", "]]>"
_WHOLE_CDATA = re.compile(r"<!\[CDATA\[.*?\]\]>", re.DOTALL)
_MAX_KEY = 400  # characters from the end of one value to the beginning of the next, white space before the tag aside


class TaggedFormat:
    """`opening` begins a call after the section's mark ("" where its name does), and `name` matches from there to its arguments.
    `key` matches from a parameter's `key_mark` to its value; its group "string", where there is one, says whether that is text.
    `call_end` is "" where the section ends with its only call; `begun` matches what there can be of its name and its first mark, if that is
    more than bare letters. With `in_lines`, a line end on either side of a value is not part of it; with `in_cdata`, values may stand in
    `<![CDATA[…]]>`. With `or_json`, models fall back on `json_tags`; with `bare`, they leave the section's mark out at times."""

    def __init__(
        self,
        start: str,
        end: str,
        *,
        name: str,
        key_mark: str,
        key: str,
        value_end: str,
        opening: str = "",
        call_end: str = "",
        begun: str = "",
        in_lines: bool = False,
        in_cdata: bool = False,
        or_json: bool = False,
        bare: bool = False,
    ) -> None:
        self.start = start
        self.end = end
        self.name = re.compile(rf"\s*{name}\s*")
        self.key_mark = key_mark
        self.key = re.compile(key)
        self.value_end = value_end
        self.opening = opening
        self.call_end = call_end or end
        self.in_lines = in_lines
        self.in_cdata = in_cdata
        self.or_json = or_json
        self._beginning = re.compile(rf"\s*(?:\Z|{begun or name}\s*(?:\Z|<))") if not opening else None
        follows = "|".join(re.escape(mark) for mark in (key_mark, call_end) if mark)
        head = re.compile(rf"\s*{name}\s*(?={follows})")
        again = (opening,) if opening else ()
        stream = ArgumentStream(head, self._reader, again, opening, end=end if call_end else "", bare=opening if bare else "")
        self.streams = (stream, *json_tags.streams) if or_json else (stream,)

    def may_begin(self, text: str) -> bool:
        if self.or_json and json_tags.may_begin(text):
            return True
        if self._beginning is not None:
            return self._beginning.match(text) is not None
        text = text.lstrip()
        return text.startswith(self.opening) or self.opening.startswith(text)

    def is_open(self, text: str) -> bool:
        if self.or_json and text.lstrip().startswith("{"):
            return json_tags.is_open(text)
        if self.in_cdata:
            text = _WHOLE_CDATA.sub("", text)
        return text.rfind(self.key_mark) > text.rfind(self.value_end) or (self.in_cdata and _CDATA in text)

    def parse(self, text: str, tools: Sequence[ToolSpec]) -> Section | None:
        calls: list[Call] = []
        at = 0
        while match := self.name.match(text, at):
            reader = self._reader(match[1], tools)
            rest = text[match.end() :] + (self.end if self.call_end == self.end else "")
            arguments, used = reader.read(rest)
            if reader.state != "done":
                return None
            calls.append(Call(match[1], arguments))
            at = min(match.end() + used, len(text))
        if not calls and self.or_json:
            return json_tags.parse(text, tools)
        if not calls or text[at:].strip():
            return None
        if not self.opening and calls[0].arguments == "{}" and calls[0].name not in {tool.name for tool in tools}:
            return None  # a single word between the marks: prose, more likely
        return Section(tuple(calls), len(text))

    def _reader(self, name: str, tools: Sequence[ToolSpec]) -> "TaggedArguments":
        return TaggedArguments(self, name, tools)


class TaggedArguments:
    """An `ArgumentReader`. Text is passed on while it is written, other values when they have ended."""

    def __init__(self, its: TaggedFormat, name: str, tools: Sequence[ToolSpec]) -> None:
        self.state: Literal["open", "done", "broken"] = "open"
        self._its = its
        self._name = name
        self._tools = tools
        self._held = ""
        self._member = ""  # what comes before a value that was not given yet
        self._given = False  # whether there was a member before
        self._is_value = False
        self._is_text = False  # inside a value that is passed on as it comes
        self._is_first = False  # at its beginning
        self._types: frozenset[str] = frozenset()
        self._end = its.value_end
        self._closes = False  # a value has ended, but not its tag
        self._search_from = 0

    def read(self, text: str) -> tuple[str, int]:
        self._held += text
        before = len(self._held)
        out: list[str] = []
        while self.state == "open" and (self._value(out) if self._is_value else self._between(out)):
            pass
        return "".join(out), before - len(self._held)

    def close(self) -> str:
        if self.state == "done":
            return ""
        return ('"' if self._is_text else "") + ("}" if self._given else "{}")

    def _between(self, out: list[str]) -> bool:
        """Before a parameter, or the end of the call."""
        its, body = self._its, self._held.lstrip()
        blank = len(self._held) - len(body)
        if self._closes:
            if body.startswith(its.value_end):
                self._take(blank + len(its.value_end))
                self._closes = False
                return True
            if not its.value_end.startswith(body):
                self.state = "broken"
            return False
        if body.startswith(its.call_end):
            self._take(blank + len(its.call_end))
            out.append("}" if self._given else "{}")
            self.state = "done"
        elif match := its.key.match(body):
            self._take(blank + match.end())
            key = match[1].strip()
            self._types = types_of(self._name, key, self._tools)
            if "string" in its.key.groupindex:
                self._types = TEXT_ONLY if match["string"] == "true" else self._types - TEXT_ONLY
            self._member = (", " if self._given else "{") + json_string(key) + ": "
            self._is_value, self._is_text, self._is_first, self._search_from = True, self._types == TEXT_ONLY, True, 0
            self._end = its.value_end
            if self._is_text:
                out.append(self._member + '"')
                self._given = True
        elif not (
            (body.startswith(its.key_mark) and len(body) < _MAX_KEY) or its.key_mark.startswith(body) or its.call_end.startswith(body)
        ):
            self.state = "broken"
        else:
            return False
        return True

    def _value(self, out: list[str]) -> bool:
        if self._is_first and self._its.in_lines:
            if not self._held:
                return False
            self._take(1 if self._held[0] == "\n" else 0)
        if self._is_first and self._its.in_cdata:
            body = self._held.lstrip()
            if _CDATA.startswith(body):
                return False
            if body.startswith(_CDATA):
                self._take(len(self._held) - len(body) + len(_CDATA))
                self._end = _CDATA_END
        self._is_first = False
        end = self._end
        at = self._held.find(end, self._search_from)
        if at >= 0:
            value = self._take(at)
            self._take(len(end))
            if self._its.in_lines:
                value = value.removesuffix("\n")
            out.append(json_string(value)[1:] if self._is_text else self._member + json_value(value, self._types))
            self._given, self._is_value, self._is_text = True, False, False
            self._closes = end == _CDATA_END
            return True
        if self._is_text:
            certain = len(self._held) - overlap(self._held, end)
            if self._its.in_lines and self._held[:certain].endswith("\n"):
                certain -= 1
            out.append(json_string(self._take(certain))[1:-1])
        else:
            self._search_from = max(0, len(self._held) - len(end) + 1)
        return False

    def _take(self, num_chars: int) -> str:
        taken, self._held = self._held[:num_chars], self._held[num_chars:]
        return taken


# GLM 4.5 and later
ARG_TAGS = TaggedFormat(
    "<tool_call>",
    "</tool_call>",
    name=r"([\w.:-]+)",
    key_mark="<arg_key>",
    key=r"<arg_key>([^<]{1,200})</arg_key>\s{0,50}<arg_value>",
    value_end="</arg_value>",
    or_json=True,
)
LONGCAT = TaggedFormat(
    "<longcat_tool_call>",
    "</longcat_tool_call>",
    name=r"([\w.:-]+)",
    key_mark="<longcat_arg_key>",
    key=r"<longcat_arg_key>([^<]{1,200})</longcat_arg_key>\s{0,50}<longcat_arg_value>",
    value_end="</longcat_arg_value>",
    or_json=True,
)
# Qwen3-Coder, Qwen 3.5
FUNCTION_TAGS = TaggedFormat(
    "<tool_call>",
    "</tool_call>",
    name=r"<function=([\w.:-]+)>",
    key_mark="<parameter=",
    key=r"<parameter=([^<>\n]{1,200})>",
    value_end="</parameter>",
    opening="<function=",
    call_end="</function>",
    in_lines=True,
    or_json=True,
    bare=True,
)
MINIMAX = TaggedFormat(
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    name=r'<invoke name="([\w.:-]+)">',
    key_mark="<parameter name=",
    key=r'<parameter name="([^"<>\n]{1,200})">',
    value_end="</parameter>",
    opening="<invoke name=",
    call_end="</invoke>",
)
# DeepSeek V3.2
DSML = TaggedFormat(
    "<｜DSML｜function_calls>",
    "</｜DSML｜function_calls>",
    name=r'<｜DSML｜invoke name="([\w.:-]+)">',
    key_mark="<｜DSML｜parameter name=",
    key=r'<｜DSML｜parameter name="([^"<>\n]{1,200})" string="(?P<string>true|false)">',
    value_end="</｜DSML｜parameter>",
    opening="<｜DSML｜invoke name=",
    call_end="</｜DSML｜invoke>",
)
# MiniCPM 5
FUNCTION_NAMES = TaggedFormat(
    "<function name=",
    "</function>",
    name=r'"([\w.:-]+)">',
    begun=r'"[\w.:-]*(?:\Z|"(?:\Z|>))',
    key_mark="<param name=",
    key=r'<param name="([^"<>\n]{1,200})">',
    value_end="</param>",
    in_cdata=True,
)
