"""What a model's files say that it can do. Reads configuration and chat template; needs neither its tokenizer nor its weights."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from mlx_manager.core.capabilities import Abilities, Ability, Capability, Finding, with_findings
from mlx_manager.hub.checkpoint import Checkpoint, Unusable, read_json
from mlx_manager.hub.fingerprint import files_fingerprint
from mlx_manager.inference.families.detect import calls_by, detect

_TEMPLATES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")


def abilities(checkpoint: Checkpoint, found: Mapping[Capability, Finding]) -> Abilities:
    """What was found where it was found with these files, else what they let guess. Any thread."""
    guessed = guess(checkpoint)
    if not found:
        return guessed  # its weights are not looked into
    try:
        return with_findings(guessed, found, files_fingerprint(checkpoint))
    except OSError:
        return guessed


def guess(checkpoint: Checkpoint) -> Abilities:
    """Any thread. A folder that can no longer be read can do nothing."""
    files = [file for name in ("config.json", *_TEMPLATES) if (file := checkpoint.path / name).is_file()]
    try:
        return _guess(checkpoint.path, checkpoint.kind == "vision", tuple(file.stat().st_mtime_ns for file in files))
    except (OSError, Unusable, AttributeError):  # of a list of templates that is none
        return Abilities(Ability(False), Ability(False), Ability(False), Ability(False))


@lru_cache(maxsize=1024)
def _guess(folder: Path, sees: bool, _times: tuple[int, ...]) -> Abilities:
    """The times are those of the files: it is guessed again when one has changed."""
    template = _template(folder)
    family = detect(read_json(folder / "config.json") or {}, template)
    calls = calls_by(family, template)
    return Abilities(
        tools=Ability(calls),
        thinking=Ability(family.thinks),
        thinking_switch=Ability(family.thinks),
        vision=Ability(sees),
        tool_format=None if not calls else "<|channel|>" if family.tool_format is None else family.tool_format.start,
        options=family.reasoning_options if template else (),
    )


def _template(folder: Path) -> str:
    """All of a model's chat templates; "" if it has none."""
    file = folder / _TEMPLATES[0]
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    for name in _TEMPLATES[1:]:
        given: object = (read_json(folder / name) or {}).get("chat_template")
        if isinstance(given, str):
            return given
        if isinstance(given, list):
            return "\n".join(str(one.get("template")) for one in cast(list[dict[str, Any]], given))
    return ""
