"""A family: how its models mark reasoning, spell tool calls and end a turn. A new family is one value."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mlx_manager.core.requests import REASONING_OPTIONS, ReasoningOption, ToolSpec


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call. `arguments` is the text of one JSON object: the model's own, wherever it wrote JSON."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Section:
    """The calls (one at least) in the first `num_chars` characters of a text; what follows is none of theirs."""

    calls: tuple[Call, ...]
    num_chars: int


class ArgumentReader(Protocol):
    """Reads the arguments of one call while they are written. At every moment what it has given, with what `close` gives, is one JSON
    object; and what it makes of a text does not depend on the pieces in which that comes.

    `state` is "done" when the call is over, and "broken" when what follows cannot belong to it: then the arguments are closed as
    they are, and what was not accounted for is none of theirs.
    """

    @property
    def state(self) -> Literal["open", "done", "broken"]: ...
    def read(self, text: str) -> tuple[str, int]:
        """More text → what of the JSON is certain by now, and how many characters that were read but not accounted for it stands for."""
        ...

    def close(self) -> str:
        """The shortest end that makes one JSON object of what was given."""
        ...


@dataclass(frozen=True, slots=True)
class ArgumentStream:
    """Calls whose name comes before their arguments, so that these can go out while they are written.

    `head` matches from the mark that opens a section up to the arguments, when it is certain that it is a call; its one group that
    took part is the name. After a call, `more` lead to another one of the same section (which is read as if `resume` stood before it),
    `closers` belong to the call, and `end` ends the section; white space between them is nobody's. `bare` opens a call where models
    leave the section's mark out.
    """

    head: re.Pattern[str]
    reader: Callable[[str, Sequence[ToolSpec]], ArgumentReader]
    more: tuple[str, ...] = ()
    resume: str = ""
    closers: tuple[str, ...] = ()
    end: str = ""
    bare: str = ""


class ToolFormat(Protocol):
    """How calls are spelt. A module of `families.tool_formats`, or a value there, is one.

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

    @property
    def streams(self) -> tuple[ArgumentStream, ...]:
        """The spellings whose arguments can be passed on while they are written, if any."""
        ...


@dataclass(frozen=True, slots=True)
class Tag:
    """What encloses reasoning: at the beginning of a reply, or `anywhere` in it."""

    open: str
    close: str
    anywhere: bool = False


THINK = Tag("<think>", "</think>")
REASONING = Tag("<reasoning>", "</reasoning>")
BRACKETS = Tag("[THINK]", "[/THINK]")
THOUGHT = Tag("<|channel>thought", "<channel|>", anywhere=True)
LONGCAT_THINK = Tag("<longcat_think>", "</longcat_think>")


@dataclass(frozen=True, slots=True)
class Family:
    """`model_types` are values of `model_type` in config.json; `stop_tokens` end a turn beside those that the configuration names;
    `turn_tokens` begin one, where a tokenizer may not call them special. Models with `channels` write messages of their own kind
    (`families.channels`) and need neither format nor tags. Of the template (detected, see `detect`): `thinks` says that it
    knows reasoning, `thinking_option` and `effort_option` are its switches for whether and how hard, if it has them,
    `reasoning_blocks` says that it takes earlier reasoning among the content, and `short_call_ids` that it takes ids of nine letters
    and digits only."""

    name: str
    model_types: frozenset[str]
    tool_format: ToolFormat | None = None
    reasoning_tags: tuple[Tag, ...] = (THINK, REASONING)
    stop_tokens: tuple[str, ...] = ()
    turn_tokens: tuple[str, ...] = ()
    channels: bool = False
    thinks: bool = False
    thinking_option: str | None = None
    effort_option: str | None = None
    reasoning_blocks: bool = False
    short_call_ids: bool = False

    @property
    def reasoning_options(self) -> tuple[ReasoningOption, ...]:
        """What of all that can be said of reasoning has an effect."""
        useful: dict[ReasoningOption, bool] = {
            "enabled": self.thinking_option is not None or self.thinks,
            "effort": self.thinks or self.thinking_option is not None or self.effort_option is not None,
            "budget": self.thinks,
        }
        return tuple(option for option in REASONING_OPTIONS if useful[option])
