"""What a request asks of the form of its replies → a guide for each reply. Runs where a prompt is rendered, on a worker's thread."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llguidance import LLMatcher

from mlx_manager.confined.messages import WALL_FACTOR
from mlx_manager.core.errors import InvalidField
from mlx_manager.core.requests import Conversation, Effort, GenerationRequest, JsonSchema, Prompt, Reasoning, ToolSpec
from mlx_manager.inference.families.family import Family, Tag
from mlx_manager.inference.structured.calls import CallGrammar, call_grammar, has_enforceable_form
from mlx_manager.inference.structured.compiler import Compiler, grammar_of
from mlx_manager.inference.structured.guide import Calls, Guide, Lead, Mark, Thought
from mlx_manager.inference.structured.trials import LIMIT_S

# Tokens of reasoning that an effort allows where the template has no levels of its own; None: as many as it likes.
_BUDGETS: Mapping[Effort, int | None] = {"none": 0, "minimal": 512, "low": 2048, "medium": 8192, "high": 24576, "xhigh": None, "max": None}
# For all tools together, and the least that says something of one.
_MAX_TOOLS_S, _MIN_TOOL_S = LIMIT_S * WALL_FACTOR + 0.4, 0.1
_NEWLINES = ("\n", "\n\n")
# What a message on a channel begins with, after its author.
_ANSWER_LEAD, _CALL_LEAD = "<|channel|>final<|message|>", ""


class Guides:
    """Of one model. Any thread."""

    def __init__(self, tokenizer: Any, family: Family, *, vocab_size: int, stop_tokens: frozenset[int], decode: Callable[..., str]) -> None:
        self._tokenizer = tokenizer
        self._family = family
        self._vocab_size = vocab_size
        self._stop_tokens = stop_tokens
        self._decode = decode
        self._compiler = Compiler(tokenizer, vocab_size=vocab_size, stop_tokens=sorted(stop_tokens))

    def guide(self, request: GenerationRequest, prompt: Prompt, tokens: Sequence[int], opened: Tag | None) -> Guide | None:
        """What holds a reply to `prompt`, rendered as `tokens`, to its form; None if it is free. Raises `InvalidField`."""
        answer, lead = None, Lead()
        if request.output is not None:
            output, field = request.output, request.output_field
            answer = self._compiler.compile(_written(lambda: grammar_of(output), field), field)
            lead = self._lead(_ANSWER_LEAD) if isinstance(prompt, Conversation) else lead
        calls: Calls | None = None
        banned: frozenset[int] = frozenset()
        thought: Thought | None = None
        if isinstance(prompt, Conversation):
            thought = self._thought(prompt.reasoning, tokens, opened)
            once = not request.parallel_tool_calls
            choice, tools = prompt.tool_choice, callable_tools(prompt)
            if choice.mode == "required":
                answer = self._compile_calls(self._grammar(tools, once=once).required(once=once), tools)
                lead = self._lead(_CALL_LEAD)
            elif choice.mode == "none" and prompt.tools:
                banned = self._openings()
            elif tools:
                must = choice.names is not None or any(tool.strict for tool in tools)
                if must or answer is not None or any(has_enforceable_form(tool, self._family) for tool in tools):
                    answer, calls = self._free_calls(answer, tools, once=once, must=must)
        if answer is None and calls is None and not banned and (thought is None or thought.budget is None):
            return None
        return Guide(
            field="tools" if request.output is None else request.output_field,
            decode=self._decode,
            vocab_size=self._vocab_size,
            stop_tokens=self._stop_tokens,
            thought=thought,
            answer=answer,
            calls=calls,
            lead=lead,
            leading=frozenset() if self._family.channels else frozenset(t for text in _NEWLINES if (t := self._token_of(text)) is not None),
            banned=banned,
        )

    def _free_calls(
        self, answer: LLMatcher | None, tools: Sequence[ToolSpec], *, once: bool, must: bool
    ) -> tuple[LLMatcher | None, Calls | None]:
        """Where the model decides whether to call. `must`: a call has to be held to its tools' schemas; otherwise only an `answer` with
        a form has to leave room for one."""
        grammar = self._call_grammar(tools, once=once)
        if self._family.channels or grammar is None:
            if must:
                raise _unenforceable()
            return answer, None
        if grammar.opening:
            rest = self._compile_calls(grammar.after_opening(), tools)
            return answer, Calls(self._mark(grammar.opening), rest, once=once)
        if answer is None:
            return self._compile_calls(grammar.or_text(once=once), tools), None
        return answer, None

    def _compile_calls(self, lark: str, tools: Sequence[ToolSpec]) -> LLMatcher:
        """Says which tool it is whose schema cannot be enforced, if that is found out soon."""
        began = time.monotonic()
        try:
            return self._compiler.compile(LLMatcher.grammar_from_lark(lark), "tools")
        except InvalidField:
            for tool in tools:
                left = _MAX_TOOLS_S - (time.monotonic() - began)
                if left < _MIN_TOOL_S:
                    break
                field = f"tools: {tool.name}"
                form = JsonSchema(tool.parameters, tool.strict) if tool.form is None else tool.form
                self._compiler.compile(_written(lambda form=form: grammar_of(form), field), field, limit_s=left)
            raise

    def _thought(self, wanted: Reasoning, tokens: Sequence[int], opened: Tag | None) -> Thought | None:
        family = self._family
        if family.channels:
            return self._thought_on_channel(wanted)
        template: str = self._tokenizer.chat_template or ""
        tag = opened or next((t for t in family.reasoning_tags if t.open in template), None)
        if tag is None or not family.thinks:
            return None
        thinks = wanted.wants_thinking
        budget = wanted.budget
        if budget is None and thinks is False:
            budget = 0
        if budget is None and wanted.effort is not None and family.effort_option is None:
            budget = _BUDGETS[wanted.effort]
        is_closed = self._decode(list(tokens[-8:])).rstrip().endswith(tag.close)
        may_open = opened is None and not is_closed and thinks is not False
        if opened is None and not may_open:
            return None
        return Thought(self._mark(tag.open), self._mark(tag.close), is_open=opened is not None, may_open=may_open, budget=budget)

    def _thought_on_channel(self, wanted: Reasoning) -> Thought:
        head, end = "<|channel|>analysis<|message|>", "<|end|>"
        opening, closing = Mark(head, self._spelt(head)), Mark(end, self._spelt(end))
        thinks = wanted.wants_thinking is not False
        return Thought(opening, closing, is_open=False, may_open=thinks, budget=wanted.budget, must_open=thinks)

    def _grammar(self, tools: Sequence[ToolSpec], *, once: bool) -> CallGrammar:
        grammar = self._call_grammar(tools, once=once)
        if grammar is None:
            raise _unenforceable()
        return grammar

    def _call_grammar(self, tools: Sequence[ToolSpec], *, once: bool) -> CallGrammar | None:
        template = self._tokenizer.chat_template or ""
        vocabulary = self._tokenizer.get_vocab()
        return call_grammar(self._family, tools, self._compiler.mark, template=template, vocabulary=vocabulary, once=once)

    def _lead(self, after_start: str) -> Lead:
        """Of a family that writes messages on channels: the head of the message that answers."""
        if not self._family.channels:
            return Lead()
        return Lead(self._spelt(after_start), self._spelt(f"<|start|>assistant{after_start}"))

    def _openings(self) -> frozenset[int]:
        """Tokens that open a call. Where none does, text that looks like a call is passed on as text."""
        start = self._family.tool_format.start if self._family.tool_format is not None else ""
        token = self._token_of(start) if start else None
        return frozenset() if token is None else frozenset({token})

    def _mark(self, text: str) -> Mark:
        return Mark(text, self._spelt(text))

    def _spelt(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _token_of(self, text: str) -> int | None:
        tokens = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens[0] if len(tokens) == 1 else None


def _written(grammar: Callable[[], str], field: str) -> str:
    """A grammar, unless what it is made of cannot be said in one: integers beyond 64 bits, say."""
    try:
        return grammar()
    except ValueError as error:
        raise InvalidField(f"Invalid '{field}': {str(error)[:200]}.", param=field) from None


def _unenforceable() -> InvalidField:
    return InvalidField(
        "Calls of this model cannot be enforced: leave 'tool_choice' at 'auto' and 'strict' at false.",
        param="tool_choice",
        code="unsupported_value",
    )


def callable_tools(prompt: Prompt) -> tuple[ToolSpec, ...]:
    """The tools that a reply to this prompt may call."""
    if not isinstance(prompt, Conversation) or prompt.tool_choice.mode == "none":
        return ()
    names = prompt.tool_choice.names
    return tuple(tool for tool in prompt.tools if names is None or tool.name in names)
