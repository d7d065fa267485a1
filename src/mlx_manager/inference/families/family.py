"""A family: how its models mark reasoning, spell tool calls and end a turn. A new family is one value."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_manager.core.requests import ToolSpec


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call as the model wrote it; `arguments` can be written as JSON."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Section:
    """The calls (one at least) in the first `num_chars` characters of a text; what follows is none of theirs."""

    calls: tuple[Call, ...]
    num_chars: int


class ToolFormat(Protocol):
    """How calls are spelt. A module of `families.tool_formats` is one.

    `start` opens a call section and `end` closes it ("" when it runs to the end of the reply). A format without any mark has
    `start` "": then the reply begins with a call or has none.
    """

    @property
    def start(self) -> str: ...
    @property
    def end(self) -> str: ...
    @property
    def parse(self) -> Callable[[str, Sequence[ToolSpec]], Section | None]:
        """The calls in a section's text, or None if it holds none: then it is prose."""
        ...

    @property
    def may_begin(self) -> Callable[[str], bool]:
        """Whether text that begins so (after `start`) can still become a call. Once false, more text does not make it true."""
        ...

    @property
    def is_open(self) -> Callable[[str], bool]:
        """Whether text that is cut here stops inside an argument, so that an `end` that follows is only a part of that."""
        ...


@dataclass(frozen=True, slots=True)
class Tag:
    """What encloses reasoning."""

    open: str
    close: str


THINK = Tag("<think>", "</think>")
REASONING = Tag("<reasoning>", "</reasoning>")


@dataclass(frozen=True, slots=True)
class Family:
    """`model_types` are values of `model_type` in config.json; `stop_tokens` end a turn beside those that the configuration names;
    `turn_tokens` begin one, where a tokenizer may not call them special. Of the template (detected, see `detect`): `thinks` says that it
    knows reasoning, `thinking_option` and `effort_option` are its switches for whether and how hard, if it has them, and
    `short_call_ids` says that it takes ids of nine letters and digits only."""

    name: str
    model_types: frozenset[str]
    tool_format: ToolFormat | None = None
    reasoning_tags: tuple[Tag, ...] = (THINK, REASONING)
    stop_tokens: tuple[str, ...] = ()
    turn_tokens: tuple[str, ...] = ()
    thinks: bool = False
    thinking_option: str | None = None
    effort_option: str | None = None
    short_call_ids: bool = False
