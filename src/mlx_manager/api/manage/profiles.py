"""Profiles and aliases: the names under which clients ask for models, in force for the next request."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from mlx_manager.api.answer import documented_body
from mlx_manager.api.dependencies import Services, ServicesDep
from mlx_manager.api.manage.body import read_body
from mlx_manager.core.errors import ContextTooLong, InvalidField
from mlx_manager.core.messages import Message
from mlx_manager.core.requests import Conversation, GenerationRequest, Prompt, RawPrompt, Reasoning
from mlx_manager.gateway.local import prepare
from mlx_manager.protocols.fields import Schema
from mlx_manager.protocols.openai.schema import OPTION_FIELDS, ReasoningOptions, Stop
from mlx_manager.protocols.sampling import SamplingFields, sampling, stop_strings
from mlx_manager.settings.names import Alias
from mlx_manager.settings.profiles import Profile, applied

router = APIRouter(tags=["Profiles"])

S = TypeVar("S", bound=Schema)
Id = Annotated[str, Field(min_length=1, max_length=256)]
Version = Annotated[int, Field(ge=1)]
# What a column of the database holds, and far more than any model has.
_MAX_TOKENS = 2**31 - 1


class Presets(SamplingFields, ReasoningOptions):
    """Null or absent: nothing is said for the client."""

    description: Annotated[str, Field(max_length=16_384)] | None = None
    adapter: Id | None = None
    system_prompt: Annotated[str, Field(max_length=1_000_000)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    thinking_budget: Annotated[int, Field(ge=0, le=_MAX_TOKENS)] | None = None
    context_limit: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None = None


class NewProfile(Presets):
    model: Id
    name: Id


class ChangedProfile(Presets):
    """All of it: what is left out is no longer said. `version` is that of the profile that was edited."""

    version: Version


class NewAlias(Schema):
    name: Id
    target: Id


class ChangedAlias(Schema):
    """`version` is that of the alias that was edited."""

    target: Id
    version: Version


class ProfileView(BaseModel):
    """`available`: its model is on this machine."""

    id: str
    model: str
    name: str
    description: str
    adapter: str | None
    system_prompt: str | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    max_tokens: int | None
    stop: list[str] | None
    enable_thinking: bool | None
    reasoning_effort: str | None
    thinking_budget: int | None
    context_limit: int | None
    version: int
    available: bool


class ProfileList(BaseModel):
    profiles: list[ProfileView]


class AliasView(BaseModel):
    """`available`: what it stands for is on this machine."""

    name: str
    target: str
    version: int
    available: bool


class AliasList(BaseModel):
    aliases: list[AliasView]


@router.get("/api/profiles")
async def profiles(services: ServicesDep) -> ProfileList:
    """Every profile, by id."""
    models = await _models(services)
    return ProfileList(profiles=[_profile_view(profile, models) for _, profile in sorted(services.register.names.profiles.items())])


@router.post("/api/profiles", status_code=201, openapi_extra=documented_body(NewProfile))
async def add_profile(request: Request, services: ServicesDep) -> ProfileView:
    """A new one; its model may be downloaded later."""
    given = read_body(await request.body(), NewProfile)
    models = await _models(services)
    profile = _profile(given.model, given.name, given)
    await _check_taken(services, profile, models)
    return _profile_view(await services.register.add_profile(profile, models), models)


@router.get("/api/profiles/{id:path}")
async def profile(id: str, services: ServicesDep) -> ProfileView:
    return _profile_view(services.register.profile(id), await _models(services))


@router.put("/api/profiles/{id:path}", openapi_extra=documented_body(ChangedProfile))
async def change_profile(id: str, request: Request, services: ServicesDep) -> ProfileView:
    """All of it anew, but its name. 409 if somebody else changed it meanwhile."""
    given = read_body(await request.body(), ChangedProfile)
    models = await _models(services)
    before = services.register.profile(id)
    profile = _profile(before.model, before.name, given, given.version)
    await _check_taken(services, profile, models)
    return _profile_view(await services.register.change_profile(profile, models), models)


@router.delete("/api/profiles/{id:path}", status_code=204)
async def remove_profile(id: str, request: Request, services: ServicesDep) -> Response:
    """With `version`, only if it still is that one."""
    await services.register.remove_profile(id, _version(request))
    return Response(status_code=204)


@router.get("/api/aliases")
async def aliases(services: ServicesDep) -> AliasList:
    """Every alias, by name."""
    models = await _models(services)
    return AliasList(aliases=[_alias_view(alias, services, models) for _, alias in sorted(services.register.names.aliases.items())])


@router.post("/api/aliases", status_code=201, openapi_extra=documented_body(NewAlias))
async def add_alias(request: Request, services: ServicesDep) -> AliasView:
    """A new one; what it stands for may be downloaded later."""
    given = read_body(await request.body(), NewAlias)
    models = await _models(services)
    return _alias_view(await services.register.add_alias(Alias(given.name, given.target), models), services, models)


@router.get("/api/aliases/{name:path}")
async def alias(name: str, services: ServicesDep) -> AliasView:
    return _alias_view(services.register.alias(name), services, await _models(services))


@router.put("/api/aliases/{name:path}", openapi_extra=documented_body(ChangedAlias))
async def change_alias(name: str, request: Request, services: ServicesDep) -> AliasView:
    """409 if somebody else changed it meanwhile."""
    given = read_body(await request.body(), ChangedAlias)
    models = await _models(services)
    return _alias_view(await services.register.change_alias(Alias(name, given.target, given.version), models), services, models)


@router.delete("/api/aliases/{name:path}", status_code=204)
async def remove_alias(name: str, request: Request, services: ServicesDep) -> Response:
    """With `version`, only if it still is that one."""
    await services.register.remove_alias(name, _version(request))
    return Response(status_code=204)


async def _models(services: Services) -> frozenset[str]:
    """The ids of all that is on this machine."""
    await services.pool.refresh()
    return frozenset(status.checkpoint.id for status in services.pool.statuses())


def _version(request: Request) -> int | None:
    given = request.query_params.get("version")
    if given is not None and not re.fullmatch(r"[0-9]{1,18}", given):
        raise InvalidField("Invalid 'version': expected an integer.", param="version")
    return None if given is None else int(given)


def _profile(model: str, name: str, given: Presets, version: int = 1) -> Profile:
    return Profile(
        model=model,
        name=name,
        description="" if given.description is None else given.description,
        adapter=given.adapter,
        system_prompt=given.system_prompt,
        sampling=sampling(given),
        max_tokens=given.max_tokens,
        stop=stop_strings(given.stop),
        reasoning=Reasoning(given.enable_thinking, given.reasoning_effort, given.thinking_budget),
        context_limit=given.context_limit,
        version=version,
    )


async def _check_taken(services: Services, profile: Profile, models: frozenset[str]) -> None:
    """That the model, if it is here, takes what the profile says: a short prompt is rendered with it. Raises `InvalidField`."""
    if profile.target not in models:
        return
    chats = profile.system_prompt is not None or profile.reasoning.given
    prompt: Prompt = Conversation((Message("user", "Hello"),)) if chats else RawPrompt("Hello")
    try:
        prepared = await prepare(
            services.pool, services.media, services.documents, applied(GenerationRequest(profile.target, (prompt,)), profile)
        )
    except ContextTooLong as error:
        param = "system_prompt" if profile.context_limit is None else "context_limit"
        raise InvalidField(
            f"Invalid '{param}': a prompt of one word has {error.tokens} tokens already, and {error.limit} are the limit.", param=param
        ) from error
    except InvalidField as error:
        if error.param == "model":
            raise
        param = OPTION_FIELDS[profile.reasoning.given[0]] if profile.system_prompt is None else "system_prompt"
        raise InvalidField(f"Invalid '{param}': {error.message}", param=param, code="unsupported_value") from error
    for option in prepared.unused:
        param = OPTION_FIELDS[option]
        raise InvalidField(f"The template of '{profile.model}' has no use for '{param}'.", param=param, code="unsupported_value")


def _profile_view(profile: Profile, models: frozenset[str]) -> ProfileView:
    presets: Mapping[str, Any] = {name: getattr(profile.sampling, name) for name in SamplingFields.model_fields} | {
        field: getattr(profile.reasoning, option) for option, field in OPTION_FIELDS.items()
    }
    return ProfileView(
        id=profile.id,
        model=profile.model,
        name=profile.name,
        description=profile.description,
        adapter=profile.adapter,
        system_prompt=profile.system_prompt,
        max_tokens=profile.max_tokens,
        stop=None if profile.stop is None else list(profile.stop),
        context_limit=profile.context_limit,
        version=profile.version,
        available=profile.target in models,
        **presets,
    )


def _alias_view(alias: Alias, services: Services, models: frozenset[str]) -> AliasView:
    available = services.register.names.resolve(alias.target).model in models
    return AliasView(name=alias.name, target=alias.target, version=alias.version, available=available)
