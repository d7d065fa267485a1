"""`run`: a conversation in the terminal, through the engine of the server and without one."""
# ruff: noqa: PLC0415 - the engine takes seconds to import: `--help` does without

import asyncio
import sys
from collections.abc import Generator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_manager.cli.configuration import AdaptersDir, ModelsDir, catalogue, configured, is_starter, starter
from mlx_manager.cli.terminal import INTERRUPTED, USAGE, errors, fail, leave, printable, say, warn
from mlx_manager.core.errors import ContextTooLong, MLXManagerError
from mlx_manager.core.events import ChoiceFinished, FinishReason, ReasoningDelta, TextDelta
from mlx_manager.core.messages import Message
from mlx_manager.core.requests import Conversation, GenerationRequest, Sampling

if TYPE_CHECKING:
    from rich.status import Status

    from mlx_manager.config import Config
    from mlx_manager.gateway.gateway import Gateway
    from mlx_manager.hub.checkpoint import Checkpoint

HELP = "/clear forgets the conversation, /bye or Ctrl-D ends it, Ctrl-C stops a reply."


def run(
    model: Annotated[str | None, typer.Argument(help="As `list` names it. [default: the starter model]", show_default=False)] = None,
    prompt: Annotated[str | None, typer.Argument(help="Answer this and end; without it, a chat.", show_default=False)] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told to be.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0, help="0 takes the likeliest token. [default: the model's]")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a reply. [default: what the context has room for]")] = None,
    models_dir: ModelsDir = None,
    adapters_dir: AdaptersDir = None,
) -> None:
    """Talk to a model here, without a server. Reads the prompt from a pipe if there is one."""
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            fail("There is no prompt: what came from the pipe is empty.", USAGE)
    config = configured(models_dir=models_dir, adapters_dir=adapters_dir)
    chosen = _choose(model, catalogue(config).models)
    request = GenerationRequest(chosen.id, (), Sampling(temperature=temperature), max_tokens)
    opening = () if system is None else (Message("system", system),)
    code = 0
    try:
        with _engine(config) as (runner, gateway):
            if prompt is not None:
                _answer_once(runner, gateway, request, (*opening, Message("user", prompt)))
            else:
                toy = " It is a toy: it shows that everything works, and knows next to nothing." if is_starter(chosen) else ""
                say(f"{chosen.id}.{toy} {HELP}")
                _chat(runner, gateway, request, opening)
    except typer.Exit as end:
        code = end.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    leave(code)


@contextmanager
def _engine(config: "Config") -> "Generator[tuple[asyncio.Runner, Gateway]]":
    """The server's own engine, and an event loop for it that runs while a reply is made. No database, no port."""
    import logging

    from mlx_manager import app

    logging.basicConfig(level=logging.DEBUG if config.log_level == "debug" else logging.CRITICAL)
    with asyncio.Runner() as runner:
        services = app.build_services(config, remembers_loads=False)
        services.device.start()
        try:
            yield runner, services.gateway
        finally:
            services.device.stop()


def _choose(wanted: str | None, models: "tuple[Checkpoint, ...]") -> "Checkpoint":
    names = ", ".join(model.id for model in models if model.kind == "text")
    there_is = f"There is: {names}." if names else "There are no models yet: see mlx-manager list."
    if wanted is None:
        chosen = starter(models)
        if chosen is None:
            fail(f"Which model? {there_is}", USAGE)
        return chosen
    chosen = next((model for model in models if model.id == wanted), None)
    if chosen is None:
        fail(f"There is no model '{wanted}' here. {there_is}")
    if chosen.kind != "text":
        what = "has an architecture that is not supported" if chosen.kind == "unsupported" else f"is {_article(chosen.kind)} model"
        fail(f"'{wanted}' {what}; only text models can be talked to. {there_is}")
    return chosen


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _answer_once(runner: asyncio.Runner, gateway: "Gateway", request: GenerationRequest, messages: tuple[Message, ...]) -> None:
    reply = Reply()
    try:
        runner.run(_speak(gateway, replace(request, prompts=(Conversation(messages),)), reply))
    except KeyboardInterrupt:
        reply.end()
        raise
    except MLXManagerError as error:
        reply.end()
        fail(error.message)
    reply.end()
    if reply.reason in ("length", "context_full"):
        warn(f"(cut off: {_why_cut(reply.reason)})")


def _chat(runner: asyncio.Runner, gateway: "Gateway", request: GenerationRequest, opening: tuple[Message, ...]) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401  # pyright: ignore[reportUnusedImport] - gives `input` its line editing and its history
    messages = opening
    while True:
        try:
            line = input(">>> ").strip()
            match line:
                case "":
                    pass
                case "/bye" | "/exit" | "/quit":
                    return
                case "/clear":
                    messages = opening
                    say("Forgotten.")
                case "/help" | "/?":
                    say(HELP)
                case _:
                    messages = _turn(runner, gateway, request, messages, line)
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say(f"\n{HELP}")


def _turn(
    runner: asyncio.Runner, gateway: "Gateway", request: GenerationRequest, messages: tuple[Message, ...], line: str
) -> tuple[Message, ...]:
    """The conversation afterwards. What failed was never asked; what was stopped was said up to there."""
    asked = (*messages, Message("user", line))
    reply = Reply()
    try:
        runner.run(_speak(gateway, replace(request, prompts=(Conversation(asked),)), reply))
    except KeyboardInterrupt:
        reply.end()
        say("(stopped)")
    except MLXManagerError as error:
        reply.end()
        warn(error.message + (" /clear forgets it." if isinstance(error, ContextTooLong) else ""))
        return messages
    reply.end()
    if reply.reason in ("length", "context_full"):
        say(f"(cut off: {_why_cut(reply.reason)})")
    return (*asked, Message("assistant", reply.text))


def _why_cut(reason: FinishReason) -> str:
    return "--max-tokens" if reason == "length" else "the context is full"


async def _speak(gateway: "Gateway", request: GenerationRequest, reply: "Reply") -> None:
    async with aclosing(gateway.stream(request)) as events:
        async for event in events:
            match event:
                case TextDelta(text):
                    reply.say(text)
                case ReasoningDelta(text):
                    reply.think(text)
                case ChoiceFinished(reason):
                    reply.reason = reason
                case _:
                    pass


@dataclass
class Reply:
    """What has come of one reply, shown as it comes. In a pipe there is only the answer: no reasoning, no colours."""

    text: str = ""
    reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self._shows_all = sys.stdout.isatty()
        self._thinks = False
        self._column = 0
        self._waiting: Status | None = errors().status("", spinner="dots")
        self._waiting.start()

    def say(self, text: str) -> None:
        self.text += text
        if self._thinks:
            self._write("\x1b[0m\n\n")
            self._thinks = False
            text = text.lstrip("\n")
        self._write(printable(text) if self._shows_all else text)

    def think(self, text: str) -> None:
        if self._shows_all:
            self._write(("" if self._thinks else "\x1b[2m") + printable(text))
            self._thinks = True

    def end(self) -> None:
        """The next output begins on a line of its own."""
        self._stop_waiting()
        if self._thinks:
            self._write("\x1b[0m")
            self._thinks = False
        if self._column:
            self._write("\n")

    def _write(self, text: str) -> None:
        self._stop_waiting()
        sys.stdout.write(text)
        sys.stdout.flush()
        if text:
            self._column = 0 if text.endswith("\n") else 1

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.stop()
            self._waiting = None
