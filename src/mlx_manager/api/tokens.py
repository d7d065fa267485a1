"""`/v1` for the tokens themselves: what a model makes of a prompt, and back. No weights are needed."""

import asyncio
from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from mlx_manager.api.answer import documented_body, json_reply
from mlx_manager.api.dependencies import ServicesDep
from mlx_manager.core.errors import InvalidField
from mlx_manager.core.requests import Conversation, GenerationRequest, RawPrompt
from mlx_manager.inference.dialect import Dialect
from mlx_manager.inference.families.prompt import PromptRenderer
from mlx_manager.inference.text_reader import TextReader
from mlx_manager.protocols.fields import ignored_header
from mlx_manager.protocols.openai.tokens import (
    DetokenizeSchema,
    TokenizeSchema,
    WantedTokens,
    read_detokenize,
    read_tokenize,
    write_tokens,
)

router = APIRouter(tags=["Tokens"])


@router.post("/v1/tokenize", openapi_extra=documented_body(TokenizeSchema))
async def tokenize(request: Request, services: ServicesDep) -> Response:
    """A prompt as tokens, however many."""
    wanted = read_tokenize(await request.body())
    served = services.gateway.served(GenerationRequest(wanted.model, (wanted.prompt,)))
    reader = await services.pool.reader(served.model)
    tokens = await asyncio.to_thread(_tokens, reader, replace(wanted, prompt=served.prompts[0]))
    limit = reader.context_length if served.context_limit is None else min(served.context_limit, reader.context_length)
    strs = [reader.tokenizer.convert_ids_to_tokens(token) for token in tokens] if wanted.token_strs else None
    return json_reply(write_tokens(tokens, limit, strs), _headers(wanted.ignored))


@router.post("/v1/detokenize", openapi_extra=documented_body(DetokenizeSchema))
async def detokenize(request: Request, services: ServicesDep) -> Response:
    """Tokens as text."""
    wanted = read_detokenize(await request.body())
    reader = await services.pool.reader(services.register.names.resolve(wanted.model).model)
    for i, token in enumerate(wanted.tokens):
        if token >= reader.vocab_size:
            raise InvalidField(f"Invalid 'tokens[{i}]': token ids must be from 0 to {reader.vocab_size - 1}.", param=f"tokens[{i}]")
    return json_reply({"prompt": await asyncio.to_thread(reader.decode, wanted.tokens)}, _headers(wanted.ignored))


def _tokens(reader: Dialect | TextReader, wanted: WantedTokens) -> tuple[int, ...]:
    match reader, wanted.prompt:
        case Dialect(tokenizer=tokenizer), RawPrompt(str(text)):
            return tuple(tokenizer.encode(text, add_special_tokens=wanted.add_special_tokens))
        case Dialect(tokenizer=tokenizer, family=family), prompt:
            return PromptRenderer(tokenizer, family).render(prompt).tokens
        case TextReader(), RawPrompt(str(text)):
            (tokens,) = reader.encode([text], add_special_tokens=wanted.add_special_tokens)
            return tokens
        case TextReader(), RawPrompt(tokens):
            assert not isinstance(tokens, str)
            return tokens
        case TextReader(), Conversation():
            raise InvalidField(f"The model '{wanted.model}' does not chat: use 'prompt'.", param="messages", code="unsupported_value")


def _headers(ignored: tuple[str, ...]) -> dict[str, str]:
    return {"x-ignored-fields": ignored_header(ignored)} if ignored else {}
