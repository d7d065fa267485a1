"""How a model reads and writes: tokenizer, template, family, defaults. Needs its configuration, not its weights."""

import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mlx_manager.core.errors import ContextTooLong, InvalidField
from mlx_manager.core.requests import REASONING_OPTIONS, Conversation, GenerationRequest, ReasoningOption, Sampling
from mlx_manager.inference.engine.sequence import SequenceSpec, TokenSampling
from mlx_manager.inference.families.family import Family
from mlx_manager.inference.families.prompt import PromptRenderer, Rendered, Tokenizer
from mlx_manager.inference.picture_reader import PictureReader
from mlx_manager.inference.reply import ReplyReader
from mlx_manager.inference.structured.guides import Guides, callable_tools

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request as the engine takes it: `specs` and `rendered` have one entry for each choice, in their order.
    `room` is what the context leaves for each choice's reply, in tokens; `unused` of what was said of reasoning has no effect."""

    request: GenerationRequest
    specs: tuple[SequenceSpec, ...]
    rendered: tuple[Rendered, ...]
    room: tuple[int, ...]
    prompt_tokens: int
    unused: tuple[ReasoningOption, ...]


@dataclass(frozen=True, slots=True)
class Dialect:
    """`context_length` and `vocab_size` in tokens; `defaults` is generation_config.json, {} where there is none; `pictures` is
    there for a model that can be shown some."""

    tokenizer: Tokenizer
    family: Family
    context_length: int
    vocab_size: int
    stop_tokens: frozenset[int]
    defaults: Mapping[str, Any]
    pictures: PictureReader | None = None
    guides: Guides = field(init=False)

    def __post_init__(self) -> None:
        guides = Guides(self.tokenizer, self.family, vocab_size=self.vocab_size, stop_tokens=self.stop_tokens, decode=self.decode)
        object.__setattr__(self, "guides", guides)

    def prepare(self, request: GenerationRequest) -> Prepared:
        """Renders the prompts and resolves what the client left open. Raises `InvalidField` and `ContextTooLong`."""
        began = time.monotonic()
        renderer = PromptRenderer(self.tokenizer, self.family, self.pictures)
        specs: list[SequenceSpec] = []
        rendered: list[Rendered] = []
        room: list[int] = []
        prompt_tokens = 0
        limit = self.context_length if request.context_limit is None else min(request.context_limit, self.context_length)
        max_tokens = request.default_max_tokens if request.max_tokens is None else request.max_tokens
        for prompt in request.prompts:
            result = renderer.render(prompt)
            self._check_tokens(result)
            prompt_tokens += len(result.tokens)
            left = limit - len(result.tokens)
            if left < 1:
                raise ContextTooLong(limit=limit, tokens=len(result.tokens))
            guide = self.guides.guide(request, prompt, result.tokens, result.opened)
            for reply in range(request.num_replies):
                rendered.append(result)
                room.append(left)
                specs.append(
                    SequenceSpec(
                        prompt=result.tokens,
                        max_tokens=left if max_tokens is None else min(max_tokens, left),
                        sampling=self._resolve(request.sampling, reply),
                        stop_tokens=self.stop_tokens,
                        num_top_logprobs=request.num_top_logprobs,
                        priority=request.priority,
                        client=request.client,
                        deadline=None if request.timeout_s is None else began + request.timeout_s,
                        constraint=None if guide is None else guide.copy(),
                        pictures=result.pictures,
                    )
                )
        return Prepared(request, tuple(specs), tuple(rendered), tuple(room), prompt_tokens, self._unused(request))

    def _unused(self, request: GenerationRequest) -> tuple[ReasoningOption, ...]:
        """What was said of reasoning and changes nothing."""
        given = {option for prompt in request.prompts if isinstance(prompt, Conversation) for option in prompt.reasoning.given}
        return tuple(option for option in REASONING_OPTIONS if option in given and option not in self.family.reasoning_options)

    def reader(self, prepared: Prepared, choice: int) -> ReplyReader:
        """What turns the tokens of a choice into events."""
        request = prepared.request
        prompt = request.prompts[choice // request.num_replies]
        return ReplyReader(
            choice,
            family=self.family,
            decode=self.decode,
            describe=self._describe,
            stop=() if request.stop is None else request.stop,
            tools=callable_tools(prompt),
            opened=prepared.rendered[choice].opened,
            splits=isinstance(prompt, Conversation),
            parallel_tool_calls=request.parallel_tool_calls,
        )

    def _check_tokens(self, rendered: Rendered) -> None:
        if not rendered.tokens:
            raise InvalidField("The prompt must have at least one token.", param="prompt")
        if not rendered.pictures and not all(0 <= t < self.vocab_size for t in rendered.tokens):
            raise InvalidField(f"Token ids must be from 0 to {self.vocab_size - 1}.", param="prompt")

    def _resolve(self, asked: Sampling, reply: int) -> TokenSampling:
        """What the client said, else what the model's makers recommend, else no effect. Each reply draws by a seed of its own."""

        def either(value: T | None, name: str, otherwise: T, kind: Callable[[Any], T]) -> T:
            if value is not None:
                return value
            recommended = self.defaults.get(name)
            return otherwise if recommended is None else kind(recommended)

        for token in asked.logit_bias:
            if not 0 <= token < self.vocab_size:
                raise InvalidField(f"logit_bias: token {token} is not in the model's vocabulary.", param="logit_bias")
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        greedy_by_default = self.defaults.get("do_sample") is False
        return TokenSampling(
            seed=seed + reply,
            temperature=0.0 if asked.temperature is None and greedy_by_default else either(asked.temperature, "temperature", 1.0, float),
            top_p=either(asked.top_p, "top_p", 1.0, float),
            top_k=either(asked.top_k, "top_k", 0, int),
            min_p=either(asked.min_p, "min_p", 0.0, float),
            repetition_penalty=either(asked.repetition_penalty, "repetition_penalty", 1.0, float),
            presence_penalty=either(asked.presence_penalty, "presence_penalty", 0.0, float),
            frequency_penalty=either(asked.frequency_penalty, "frequency_penalty", 0.0, float),
            logit_bias=asked.logit_bias,
        )

    def decode(self, tokens: Sequence[int]) -> str:
        tokens = [t for t in tokens if t < self.vocab_size]  # the others are names of pictures
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _describe(self, token: int) -> tuple[str, bytes]:
        """A token as text, and as the bytes that it stands for: a part of a character is no text, but has its bytes."""
        text = self.decode([token])
        return text, _bytes_spelt(self.tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text.encode()


def _bytes_spelt(piece: str) -> bytes:
    """The bytes of a vocabulary entry: `<0xE2>` as SentencePiece spells one, or a character for each as byte-level BPE does."""
    if spelt := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes([int(spelt[1], 16)])
    return b"".join(_BYTE_OF[c] if c in _BYTE_OF else c.encode() for c in piece)


def _byte_characters() -> Mapping[str, bytes]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(0x100 + i): bytes([b]) for i, b in enumerate(others)}


_BYTE_OF = _byte_characters()
