"""Where profiles and aliases are kept: every change goes to the database first, and is in force once it is there."""

import asyncio
from collections.abc import AsyncGenerator, Collection
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from typing import Any, cast

from sqlalchemy import JSON, BigInteger
from sqlmodel import Field, select
from sqlmodel.ext.asyncio.session import AsyncSession

from mlx_manager.core.errors import Conflict, NotFound
from mlx_manager.core.requests import Effort, Reasoning, Sampling
from mlx_manager.settings.names import Alias, Names, check_adapter, check_alias_name, check_profile_name, check_target, check_unused
from mlx_manager.settings.profiles import Profile
from mlx_manager.storage.database import Database
from mlx_manager.storage.record import Record

# Of a profile; `logit_bias` is by the tokens of one vocabulary, and no preset.
_SAMPLING = tuple(field.name for field in fields(Sampling) if field.name != "logit_bias")


class ProfileRecord(Record, table=True):
    __tablename__ = "profile"  # pyright: ignore[reportAssignmentType] - as SQLModel wants it

    model: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    description: str
    adapter: str | None
    system_prompt: str | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None = Field(sa_type=BigInteger)
    max_tokens: int | None
    stop: list[str] | None = Field(sa_type=JSON(none_as_null=True))  # pyright: ignore[reportArgumentType] - an instance is taken too
    enable_thinking: bool | None
    reasoning_effort: str | None
    thinking_budget: int | None
    context_limit: int | None
    version: int


class AliasRecord(Record, table=True):
    __tablename__ = "alias"  # pyright: ignore[reportAssignmentType] - as SQLModel wants it

    name: str = Field(primary_key=True)
    target: str
    version: int


class Register:
    """Owns the profiles and aliases. `names` is a snapshot: whoever has one sees no change, whoever asks next sees all of it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._changing = asyncio.Lock()
        self.names = Names()

    async def open(self) -> None:
        """The database is open by now."""
        async with self._database.session() as session:
            self.names = await _names(session)

    async def add_profile(self, profile: Profile, models: Collection[str]) -> Profile:
        """`models` are the ids of all that is on this machine. Raises `Conflict`, `InvalidField` and `NotSaved`."""
        async with self._change() as session:
            check_profile_name(profile, self.names, models)
            check_adapter(profile, models)
            added = replace(profile, version=1)
            session.add(_profile_record(added))
        return added

    async def change_profile(self, profile: Profile, models: Collection[str]) -> Profile:
        """Puts it in the place of the one of its name, if that still is the version that this was made from. Raises `NotFound`, and what
        `add_profile` does."""
        async with self._change() as session:
            _check_version(self.profile(profile.id).version, profile.version)
            check_adapter(profile, models)
            changed = replace(profile, version=profile.version + 1)
            await session.merge(_profile_record(changed))
        return changed

    async def remove_profile(self, id: str, version: int | None = None) -> None:
        """If it still is of that version, or whatever it is. Raises `NotFound`, `Conflict` and `NotSaved`."""
        async with self._change() as session:
            profile = self.profile(id)
            _check_version(profile.version, version)
            check_unused(profile, self.names)
            await session.delete(await session.get_one(ProfileRecord, (profile.model, profile.name)))

    async def add_alias(self, alias: Alias, models: Collection[str]) -> Alias:
        """As `add_profile`."""
        async with self._change() as session:
            check_alias_name(alias, self.names, models)
            check_target(alias, self.names, models)
            added = replace(alias, version=1)
            session.add(_alias_record(added))
        return added

    async def change_alias(self, alias: Alias, models: Collection[str]) -> Alias:
        """As `change_profile`."""
        async with self._change() as session:
            _check_version(self.alias(alias.name).version, alias.version)
            check_target(alias, self.names, models)
            changed = replace(alias, version=alias.version + 1)
            await session.merge(_alias_record(changed))
        return changed

    async def remove_alias(self, name: str, version: int | None = None) -> None:
        """As `remove_profile`."""
        async with self._change() as session:
            _check_version(self.alias(name).version, version)
            await session.delete(await session.get_one(AliasRecord, name))

    def profile(self, id: str) -> Profile:
        """Raises `NotFound`."""
        if id not in self.names.profiles:
            raise NotFound(f"There is no profile '{id}'.")
        return self.names.profiles[id]

    def alias(self, name: str) -> Alias:
        """Raises `NotFound`."""
        if name not in self.names.aliases:
            raise NotFound(f"There is no alias '{name}'.")
        return self.names.aliases[name]

    @asynccontextmanager
    async def _change(self) -> AsyncGenerator[AsyncSession]:
        """One change at a time, so that what was checked still holds when it is written."""
        async with self._changing:
            async with self._database.change() as session:
                yield session
                names = await _names(session)
            self.names = names


def _check_version(there: int, edited: int | None) -> None:
    if edited is not None and edited != there:
        raise Conflict(
            f"It was changed meanwhile: this is about version {edited}, and there is version {there}. Look at it again.",
            param="version",
            code="version_mismatch",
        )


async def _names(session: AsyncSession) -> Names:
    profiles = [_profile(record) for record in await session.exec(select(ProfileRecord))]
    aliases = [Alias(record.name, record.target, record.version) for record in await session.exec(select(AliasRecord))]
    return Names({profile.id: profile for profile in profiles}, {alias.name: alias for alias in aliases})


def _profile(record: ProfileRecord) -> Profile:
    return Profile(
        model=record.model,
        name=record.name,
        description=record.description,
        adapter=record.adapter,
        system_prompt=record.system_prompt,
        sampling=Sampling(**{name: getattr(record, name) for name in _SAMPLING}),
        max_tokens=record.max_tokens,
        stop=None if record.stop is None else tuple(record.stop),
        reasoning=Reasoning(record.enable_thinking, cast(Effort | None, record.reasoning_effort), record.thinking_budget),
        context_limit=record.context_limit,
        version=record.version,
    )


def _profile_record(profile: Profile) -> ProfileRecord:
    sampling: dict[str, Any] = {name: getattr(profile.sampling, name) for name in _SAMPLING}
    return ProfileRecord(
        model=profile.model,
        name=profile.name,
        description=profile.description,
        adapter=profile.adapter,
        system_prompt=profile.system_prompt,
        **sampling,
        max_tokens=profile.max_tokens,
        stop=None if profile.stop is None else list(profile.stop),
        enable_thinking=profile.reasoning.enabled,
        reasoning_effort=profile.reasoning.effort,
        thinking_budget=profile.reasoning.budget,
        context_limit=profile.context_limit,
        version=profile.version,
    )


def _alias_record(alias: Alias) -> AliasRecord:
    return AliasRecord(name=alias.name, target=alias.target, version=alias.version)
