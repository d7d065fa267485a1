"""The path of one request through a loaded model: submit → read → events."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.events import Event, Finished, Usage
from mlx_manager.core.requests import Conversation, GenerationRequest
from mlx_manager.inference.dialect import Dialect, Prepared
from mlx_manager.inference.engine.engine import Engine
from mlx_manager.inference.engine.sequence import Ended, Token


@dataclass(frozen=True, slots=True)
class LocalModel:
    dialect: Dialect
    engine: Engine

    async def generate(self, prepared: Prepared) -> AsyncGenerator[Event]:
        """Everything after `Started`. Closing the iterator frees what the request holds. Raises `EngineFault`, and `InvalidField` for
        pictures that the model turned out not to take."""
        if not self.engine.takes_pictures:
            _check_no_pictures(prepared.request)
        readers = [self.dialect.reader(prepared, choice) for choice in range(len(prepared.specs))]
        # Nothing is said where only the prompt is to be computed; the engine knows no reply of less than one token.
        is_silent = prepared.request.max_tokens == 0
        specs = tuple(replace(spec, max_tokens=1) for spec in prepared.specs) if is_silent else prepared.specs
        stream = self.engine.submit(specs)
        unfinished = set(range(len(readers)))
        try:
            async for item in stream:
                reader = readers[item.index]
                if item.index not in unfinished:
                    continue  # tokens that were on their way when a stop string ended the choice
                match item:
                    case Token() if is_silent:
                        continue
                    case Token():
                        for event in reader.read(item):
                            yield event
                        if not reader.ended:
                            continue
                        stream.cancel(item.index)
                        ending = reader.finish("stop", at_context_end=False)
                    case Ended(index, reason):
                        is_full = reader.num_tokens == prepared.room[index]
                        ending = reader.finish("length" if is_silent else reason, at_context_end=is_full)
                unfinished.discard(item.index)
                for event in ending:
                    yield event
        finally:
            stream.close()
        yield Finished(
            Usage(
                prompt=prepared.prompt_tokens,
                cached=sum(stream.num_cached(i) for i in range(0, len(readers), prepared.request.num_replies)),
                completion=sum(r.num_tokens for r in readers),
                reasoning=sum(r.num_reasoning_tokens for r in readers),
            ),
            stream.timing(0),
        )


def _check_no_pictures(request: GenerationRequest) -> None:
    for prompt in request.prompts:
        for message in prompt.messages if isinstance(prompt, Conversation) else ():
            for shown in message.media:
                text = f"This model's way of looking at pictures is not supported: it cannot take the one in '{shown.where}'."
                raise InvalidField(text, param=shown.where, code="unsupported_value")
