"""A family: how its models mark reasoning, spell tool calls and end a turn. A new family is one value."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_manager.core.requests import ToolSpec


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call as the model wrote it."""

    name: str
    arguments: Mapping[str, Any]


class ToolFormat(Protocol):
    """How calls are spelt. A module of `families.tool_formats` is one.

    `start` opens a call section and `end` closes it ("" when it runs to the end of the reply). A format without any mark has
    `start` "": then the whole reply is a call or is not, and `may_begin` says whether text that begins so can still become one.
    """

    @property
    def start(self) -> str: ...
    @property
    def end(self) -> str: ...
    @property
    def parse(self) -> Callable[[str, Sequence[ToolSpec]], list[Call] | None]:
        """The calls in a section's text, or None if it holds none: then it is prose."""
        ...

    @property
    def may_begin(self) -> Callable[[str], bool]: ...


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
    `thinking_option` is the template's switch for reasoning, if it has one (detected, see `detect`)."""

    name: str
    model_types: frozenset[str]
    tool_format: ToolFormat | None = None
    reasoning_tags: tuple[Tag, ...] = (THINK, REASONING)
    stop_tokens: tuple[str, ...] = ()
    thinking_option: str | None = None
