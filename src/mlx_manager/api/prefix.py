"""Why a first token took as long as it did: how much of a prompt is computed already, and where that ends."""

from fastapi import APIRouter, Request
from pydantic import BaseModel

from mlx_manager.api.dependencies import ServicesDep
from mlx_manager.gateway.local import prepare
from mlx_manager.inference.engine.explain import REASONS, Reason
from mlx_manager.protocols.body import read_json_object
from mlx_manager.protocols.openai.requests import read_chat, read_completion

router = APIRouter(tags=["System"])


class PrefixExplanation(BaseModel):
    """Counts are of tokens. The prompt is like that of the most similar recent request up to token `position`; there it goes on with
    `text`, and the other with `other_text` (the beginning of each; empty at an end)."""

    prompt_tokens: int
    cached_tokens: int
    on_disk_tokens: int
    reason: Reason
    explanation: str
    position: int
    text: str
    other_text: str


@router.post("/api/prefix/explain")
async def explain(request: Request, services: ServicesDep) -> PrefixExplanation:
    """Takes the body of a chat or a completion request and computes nothing of it. Of several prompts the first is explained."""
    body = await request.body()
    wanted = read_chat(body) if "messages" in read_json_object(body) else read_completion(body)
    served = services.gateway.served(wanted.request)
    prepared = await prepare(services.pool, services.media, services.documents, served)
    dialect = await services.pool.dialect(served.model)
    async with services.pool.lend(served.model) as model:
        found = await model.engine.explain(prepared.specs[0])
    return PrefixExplanation(
        prompt_tokens=found.num_tokens,
        cached_tokens=found.num_cached,
        on_disk_tokens=found.num_on_disk,
        reason=found.reason,
        explanation=REASONS[found.reason],
        position=found.position,
        text=dialect.decode(found.ours),
        other_text=dialect.decode(found.theirs),
    )
