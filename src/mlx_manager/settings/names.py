"""What the names that clients ask for stand for: models, profiles and aliases. Pure: a snapshot, and what may be added to it."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from mlx_manager.core.errors import Conflict, InvalidField
from mlx_manager.core.requests import GenerationRequest
from mlx_manager.hub.checkpoint import MAX_ID_LENGTH, is_valid_id
from mlx_manager.settings.profiles import Profile, applied

_SUFFIX = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_SYNTAX = "letters, digits, '.', '_' and '-', begins with a letter or digit, and has no '..'"


@dataclass(frozen=True, slots=True)
class Alias:
    """A free name for a model, a `model:adapter` or a `model:profile`; never for another alias. `version` counts the changes, from 1."""

    name: str
    target: str
    version: int = 1


@dataclass(frozen=True, slots=True)
class Resolved:
    """A model as the pool knows it, and the profile that it is asked with."""

    model: str
    profile: Profile | None = None


@dataclass(frozen=True, slots=True)
class Names:
    """Profiles by `model:name`, aliases by their name. What is configured comes before what lies on the disk: a model or an adapter that
    turns up later under the same name changes nothing for those who ask for it already."""

    profiles: Mapping[str, Profile] = field(default_factory=dict[str, Profile])
    aliases: Mapping[str, Alias] = field(default_factory=dict[str, Alias])

    def resolve(self, name: str) -> Resolved:
        """A name that is not configured stands for the model of that name, if there is one."""
        pointed = self.aliases[name].target if name in self.aliases else name
        profile = self.profiles.get(pointed)
        return Resolved(pointed) if profile is None else Resolved(profile.target, profile)

    def served(self, request: GenerationRequest) -> GenerationRequest:
        """The request as a model gets it."""
        resolved = self.resolve(request.model)
        return replace(request, model=resolved.model) if resolved.profile is None else applied(request, resolved.profile)

    def pointing_at(self, target: str) -> Iterator[str]:
        """The aliases for it."""
        return (alias.name for alias in self.aliases.values() if alias.target == target)


def check_profile_name(profile: Profile, names: Names, models: Collection[str]) -> None:
    """Before there is one of that name. `models` are the ids of all that is on this machine; one that is not may be downloaded later.
    Raises `InvalidField`, and `Conflict` for a name that means something else."""
    _check_model_id(profile.model, "model")
    _check_suffix(profile.name, "name")
    if len(profile.id) > MAX_ID_LENGTH:
        raise InvalidField(f"Invalid 'name': with its model it may have {MAX_ID_LENGTH} characters.", param="name")
    if profile.model in names.aliases:
        target = names.aliases[profile.model].target
        raise InvalidField(f"Invalid 'model': '{profile.model}' is an alias. It stands for '{target}'.", param="model")
    if profile.id in names.profiles:
        raise Conflict(f"There is a profile '{profile.id}' already.", param="name", code="already_exists")
    if profile.id in models:
        raise Conflict(f"The model '{profile.model}' has an adapter named '{profile.name}': a profile needs another name.", param="name")
    if profile.id in names.aliases:
        raise Conflict(f"'{profile.id}' is an alias: a profile needs another name.", param="name")


def check_adapter(profile: Profile, models: Collection[str]) -> None:
    """That its model has the adapter, if it is here. Raises `InvalidField`."""
    if profile.adapter is None:
        return
    _check_suffix(profile.adapter, "adapter")
    if profile.model in models and profile.target not in models:
        there = [id.partition(":")[2] for id in sorted(models) if id.startswith(f"{profile.model}:")]
        has = f"It has: {', '.join(there)}." if there else "It has none."
        raise InvalidField(f"The model '{profile.model}' has no adapter '{profile.adapter}'. {has}", param="adapter")


def check_alias_name(alias: Alias, names: Names, models: Collection[str]) -> None:
    """As `check_profile_name`."""
    _check_name(alias.name, "name")
    if alias.name in names.aliases:
        raise Conflict(f"There is an alias '{alias.name}' already.", param="name", code="already_exists")
    if alias.name in models:
        raise Conflict(f"There is a model '{alias.name}': an alias needs another name.", param="name")
    if alias.name in names.profiles:
        raise Conflict(f"There is a profile '{alias.name}': an alias needs another name.", param="name")
    if other := next(names.pointing_at(alias.name), None):
        raise Conflict(f"The alias '{other}' stands for '{alias.name}', and one does not stand for another.", param="name")


def check_target(alias: Alias, names: Names, models: Collection[str]) -> None:
    """That it stands for something that is no alias, and of a model that is here for something that it has. Raises `InvalidField`."""
    _check_name(alias.target, "target")
    if alias.target == alias.name or alias.target in names.aliases:
        raise InvalidField(f"Invalid 'target': '{alias.target}' is an alias, and one does not stand for another.", param="target")
    model, _, suffix = alias.target.partition(":")
    if suffix and model in models and alias.target not in models and alias.target not in names.profiles:
        raise InvalidField(f"The model '{model}' has no profile and no adapter '{suffix}'.", param="target")


def check_unused(profile: Profile, names: Names) -> None:
    """Before it is deleted. Raises `Conflict`."""
    if aliases := sorted(names.pointing_at(profile.id)):
        raise Conflict(f"The alias{'' if len(aliases) == 1 else 'es'} {', '.join(aliases)} would stand for nothing.", param=None)


def _check_name(name: str, param: str) -> None:
    model, colon, suffix = name.partition(":")
    _check_model_id(model, param)
    if colon:
        _check_suffix(suffix, param)
    if len(name) > MAX_ID_LENGTH:
        raise InvalidField(f"Invalid '{param}': it may have {MAX_ID_LENGTH} characters.", param=param)


def _check_model_id(id: str, param: str) -> None:
    if not is_valid_id(id):
        raise InvalidField(f"Invalid '{param}': a model's id is one name or two with a '/' between, each of {_SYNTAX}.", param=param)


def _check_suffix(name: str, param: str) -> None:
    if ".." in name or not _SUFFIX.fullmatch(name):
        raise InvalidField(f"Invalid '{param}': a name is made of {_SYNTAX}.", param=param)
