"""Messages and tools → tokens, through the model's own chat template.

Text of a user never becomes a control token. Wherever it spells one, a character that no text contains is put into the
spelling before the template runs, and the rendered text is tokenised in the pieces between these characters.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from jinja2 import TemplateError

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Document, Image, Media, Message, RemoteImage, Video
from mlx_manager.core.requests import Conversation, Prompt, RawPrompt, Reasoning, ToolSpec
from mlx_manager.inference.families.family import Family, Tag
from mlx_manager.inference.families.time_limit import TookTooLong, within
from mlx_manager.inference.picture import Frame, Picture, PlacedPicture

log = logging.getLogger(__name__)

# Of our seven the three that templates know.
_EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_IS_NONE = re.compile(r"(message(?:\.content|\[['\"]content['\"]\])) is (not )?none")
TEMPLATE_S = 5.0  # on a busy machine; they take milliseconds
MAX_PROMPT_CHARS = 64 << 20  # twice what a request's body may have
_NOT_HERE = "what is only named was fetched before, and documents were read"
_NO_VIDEOS: Mapping[Video, Sequence[Frame]] = MappingProxyType({})
_BREAK = "\ufdd0"  # a noncharacter: no text may contain it, and what does has it removed


class AddedToken(Protocol):
    content: str
    special: bool


class Tokenizer(Protocol):
    """What we use of a Hugging Face tokenizer."""

    @property
    def chat_template(self) -> str | None: ...
    @property
    def added_tokens_decoder(self) -> Mapping[int, "AddedToken"]: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> str: ...
    def get_vocab(self) -> dict[str, int]: ...


class PictureSource(Protocol):
    """`PictureReader`: how a model looks at pictures."""

    @property
    def placeholders(self) -> tuple[str, ...]: ...
    def watch(self, video: Video) -> tuple[Frame, ...]: ...
    def read(self, image: Image | Frame, placeholder: str) -> Picture: ...


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as tokens. `opened` is the reasoning tag that its end leaves open: the reply starts inside. Where `pictures` stand, the
    tokens are the names that the pictures have."""

    tokens: tuple[int, ...]
    opened: Tag | None = None
    pictures: tuple[PlacedPicture, ...] = ()


class PromptRenderer:
    """Renders for one model. Stateless between calls; runs on any thread."""

    def __init__(self, tokenizer: Tokenizer, family: Family, pictures: PictureSource | None = None) -> None:
        """`pictures` is None for a model that reads text only."""
        self._tokenizer = tokenizer
        self._family = family
        self._pictures = pictures
        turns = {*family.stop_tokens, *family.turn_tokens}
        added = tokenizer.added_tokens_decoder.values()
        control = sorted((t.content for t in added if t.special or t.content in turns), key=len, reverse=True)
        self._control = re.compile("|".join(re.escape(c) for c in control)) if control else None
        template = tokenizer.chat_template
        self._template = _asking_for_absence(template) if isinstance(template, str) and _IS_NONE.search(template) else None

    def render(self, prompt: Prompt) -> Rendered:
        """Raises `InvalidField` if the model has no chat template, or its template refuses these messages."""
        match prompt:
            case RawPrompt(str(text)):
                return Rendered(tuple(self._tokenizer.encode(text, add_special_tokens=True)))
            case RawPrompt(tokens):
                assert not isinstance(tokens, str)
                return Rendered(tokens)
            case Conversation():
                videos = self._watched(prompt)
                text = self._text_in_time(prompt, videos)
                tokens = [t for piece in text.split(_BREAK) for t in self._tokenizer.encode(piece, add_special_tokens=False)]
                end = text.rstrip()
                opened = next((tag for tag in self._family.reasoning_tags if end.endswith(tag.open)), None)
                shown = (part for message in prompt.messages for part in message.media)
                images = [image for part in shown for image in _pictures_of(part, videos)]
                return self._with_pictures(tokens, images, opened) if images else Rendered(tuple(tokens), opened)

    def _watched(self, conversation: Conversation) -> dict[Video, tuple[Frame, ...]]:
        """The frames of its videos; none for a model that reads text only."""
        videos = (part for message in conversation.messages for part in message.media if isinstance(part, Video))
        return {} if self._pictures is None else {video: self._pictures.watch(video) for video in videos}

    def _with_pictures(self, tokens: list[int], images: Sequence[Image | Frame], opened: Tag | None) -> Rendered:
        """Puts each picture's names where the template left a place for it. Raises `InvalidField`."""
        assert self._pictures is not None, "they were refused before"
        vocabulary = self._tokenizer.get_vocab()
        for placeholder in self._pictures.placeholders:
            places = [i for i, token in enumerate(tokens) if token == vocabulary.get(placeholder)]
            if len(places) == len(images):
                break
        else:
            raise InvalidField("The model's chat template has no place for these images.", param=images[0].where, code="unsupported_value")
        named: list[int] = []
        placed: list[PlacedPicture] = []
        at = 0
        for place, image in zip(places, images, strict=True):
            named += tokens[at:place]
            picture = self._pictures.read(image, placeholder)
            placed.append(PlacedPicture(len(named), picture))
            named += picture.names
            at = place + 1
        return Rendered((*named, *tokens[at:]), opened, tuple(placed))

    def _text_in_time(self, conversation: Conversation, videos: Mapping[Video, Sequence[Frame]]) -> str:
        """A template is a program that came with the model."""
        try:
            text = within(TEMPLATE_S, lambda: self.text(conversation, videos))
        except TookTooLong:
            raise InvalidField(f"The model's chat template took longer than {TEMPLATE_S:g} seconds.", param="messages") from None
        if len(text) > MAX_PROMPT_CHARS:
            raise InvalidField("The model's chat template made too long a prompt of these messages.", param="messages")
        return text

    def text(self, conversation: Conversation, videos: Mapping[Video, Sequence[Frame]] = _NO_VIDEOS) -> str:
        """The rendered prompt, with a break character inside every control token that a user's text spells."""
        if not self._tokenizer.chat_template:
            raise InvalidField("This model has no chat template: use /v1/completions.", param="messages", code="unsupported_value")
        switches = self._options(conversation.reasoning)
        tools = [self._tool(t) for t in conversation.tools]
        # As it should be; then as templates take it that fail over their own switches, over having no list of tools, or that add
        # arguments to text.
        attempts = [
            (options, declared, as_text)
            for options in ([switches, {}] if switches else [{}])
            for declared in ([tools] if tools else [None, []])
            for as_text in ((False, True) if any(m.tool_calls for m in conversation.messages) else (False,))
        ]
        failures: list[tuple[Mapping[str, Any], Exception]] = []
        for options, declared, as_text in attempts:
            messages = [self._message(m, videos, as_text=as_text) for m in conversation.messages]
            if self._family.channels:
                messages = _one_call_each(messages)
            try:
                text = self._apply(messages, declared, options, continues=conversation.continues)
            except Exception as error:  # noqa: BLE001 - a template can fail with anything: it is told below
                failures.append((options, error))
                continue
            if failures:
                log.warning("the chat template failed with %s: %s", sorted(switches), failures[0][1])
                log.warning("it was rendered with %s, arguments as %s", sorted(options), "text" if as_text else "objects")
            return text
        failure = next(error for options, error in failures if not options)
        reason = str(failure).rstrip(".") if isinstance(failure, TemplateError) else "it failed"
        raise InvalidField(f"The model's chat template refuses these messages: {reason}.", param="messages") from failure

    def _apply(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: Mapping[str, Any], *, continues: bool
    ) -> str:
        if self._template is not None:
            options = {**options, "chat_template": self._template}
        return self._tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=not continues, continue_final_message=continues, tokenize=False, **options
        )

    def _options(self, wanted: Reasoning) -> dict[str, Any]:
        """What of it the template has a switch for."""
        options: dict[str, Any] = {}
        enabled = wanted.wants_thinking
        if self._family.thinking_option is not None and enabled is not None:
            options[self._family.thinking_option] = enabled
        if self._family.effort_option is not None and wanted.effort is not None and wanted.effort != "none":
            options[self._family.effort_option] = _EFFORTS[wanted.effort]
        return options

    def _message(self, message: Message, videos: Mapping[Video, Sequence[Frame]], *, as_text: bool) -> dict[str, Any]:
        out: dict[str, Any] = {"role": message.role, "content": self._content(message, videos)}
        family = self._family
        if message.reasoning is not None:
            reasoning = self._defused(message.reasoning)
            if family.channels and message.tool_calls and out["content"]:
                # Before a call there is one message on the channel of thoughts: their templates take nothing else.
                reasoning, out["content"] = f"{reasoning}\n\n{out['content']}", ""
            if family.reasoning_blocks and isinstance(out["content"], str):
                said = [{"type": "text", "text": out["content"]}] if out["content"] else []
                out["content"] = [{"type": "thinking", "thinking": reasoning}, *said]
            else:
                out["reasoning_content"] = reasoning
        if message.tool_calls and out["content"] == "" and self._template is not None:
            del out["content"]
        if message.tool_calls:
            out["tool_calls"] = [
                {
                    "id": self._call_id(c.id),
                    "type": "function",
                    "function": {"name": self._defused(c.name), "arguments": self._arguments(c.arguments, as_text=as_text)},
                }
                for c in message.tool_calls
            ]
        if message.tool_call_id is not None:
            out["tool_call_id"] = self._call_id(message.tool_call_id)
        if message.name is not None:
            out["name"] = self._defused(message.name)
        return out

    def _content(self, message: Message, videos: Mapping[Video, Sequence[Frame]]) -> Any:
        if isinstance(message.content, str):
            return self._defused(message.content)
        if self._pictures is None:
            first = message.media[0]
            kind, where = "video" if isinstance(first, Video) else "image", first.where
            raise InvalidField(
                f"This model reads text only: it cannot take the {kind} in '{where}'.", param=where, code="unsupported_value"
            )
        parts: list[dict[str, str]] = []
        for part in message.content:
            match part:
                case str():
                    parts.append({"type": "text", "text": self._defused(part)})
                case Image():
                    parts.append({"type": "image"})
                case Video():  # the models that have a token for videos differ in what they do with it; all of them take pictures
                    frames = videos[part]
                    parts.append({"type": "text", "text": f"Video, {len(frames)} frames:" if len(frames) > 1 else "Video, 1 frame:"})
                    parts += [{"type": "image"}] * len(frames)
                case RemoteImage() | Document():
                    raise AssertionError(_NOT_HERE)
        return parts

    def _call_id(self, call_id: str) -> str:
        """The same for the call and for its result, and such as the template takes: clients send back ids that we, or others, gave."""
        if not self._family.short_call_ids or re.fullmatch(r"[A-Za-z0-9]{9}", call_id):
            return self._defused(call_id)
        return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:9]

    def _arguments(self, text: str, *, as_text: bool) -> Any:
        """Templates want an object; arguments that are not one are passed on as the text they are."""
        if as_text:
            return self._defused(text)
        try:
            value: Any = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):
            return self._defused(text)
        return self._defused(value if isinstance(value, dict) else text)

    def _tool(self, tool: ToolSpec) -> dict[str, Any]:
        parameters = dict(tool.parameters) or {"type": "object", "properties": {}}
        function = {"name": tool.name, "description": tool.description or "", "parameters": parameters}
        return {"type": "function", "function": self._defused(function)}

    def _defused(self, value: Any) -> Any:
        """The same text, or JSON value, with no control token left in it."""
        match value:
            case str():
                plain = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a surrogate pair is no text
                plain = plain.replace(_BREAK, "")
                if self._control is None:
                    return plain
                return self._control.sub(lambda m: m[0][0] + _BREAK + m[0][1:], plain)
            case dict():
                return {self._defused(k): self._defused(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
            case list():
                return [self._defused(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
            case _:
                return value


def _one_call_each(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same calls, each in a message of its own with its result after it: templates of channels leave out all but the first."""
    out: list[dict[str, Any]] = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        calls: list[dict[str, Any]] = message.get("tool_calls", [])
        if len(calls) < 2:
            out.append(message)
            continue
        num_results = next((i for i, follows in enumerate(rest) if follows["role"] != "tool"), len(rest))
        results, rest = rest[:num_results], rest[num_results:]
        for i, call in enumerate(calls):
            its = [result for result in results if result.get("tool_call_id") == call["id"]]
            results = [result for result in results if result not in its]
            head = message if i == 0 else {"role": message["role"], "content": ""}
            out += [{**head, "tool_calls": [call]}, *its]
        out += results
    return out


def _asking_for_absence(template: str) -> str:
    """Some templates show calls only where the content is None; what is None is taken out of messages before templates see them."""
    return _IS_NONE.sub(lambda m: f"{m[1]} is defined" if m[2] else f"{m[1]} is not defined", template)


def _pictures_of(part: Media, videos: Mapping[Video, Sequence[Frame]]) -> Sequence[Image | Frame]:
    match part:
        case Image():
            return (part,)
        case Video():
            return videos[part]
        case RemoteImage():
            raise AssertionError(_NOT_HERE)
