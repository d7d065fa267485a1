"""`list` and `show`: what lies on this machine. No server is asked, and nothing is loaded."""

import asyncio
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_manager.cli.configuration import AdaptersDir, AsJson, ModelsDir, catalogue, configured
from mlx_manager.cli.terminal import ability, count, fail, label, print_json, print_table, say, size, tokens, warn
from mlx_manager.core.capabilities import CAPABILITIES

if TYPE_CHECKING:
    from mlx_manager.config import Config
    from mlx_manager.hub.checkpoint import Checkpoint
    from mlx_manager.settings.findings import Found


def list_models(models_dir: ModelsDir = None, adapters_dir: AdaptersDir = None, as_json: AsJson = False) -> None:
    """List the models on this machine."""
    found = catalogue(configured(models_dir=models_dir, adapters_dir=adapters_dir))
    if as_json:
        print_json({"models": [asdict(m) for m in found.models], "unusable": [asdict(u) for u in found.unusable]})
        return
    if found.models:
        print_table(
            [
                (m.id, m.kind, m.architecture, count(m.num_parameters), size(m.size_bytes), tokens(m.context_length), _bits(m))
                for m in found.models
            ],
            columns=("Model", "Kind", "Architecture", "Parameters", "Size", "Context", "Bits"),
            numbers=("Parameters", "Size", "Context", "Bits"),
        )
    else:
        say("No models yet. Download one with mlx-manager pull, or put a model's folder into one that you name with --models-dir.")
    for broken in found.unusable:
        warn(f"{broken.id} cannot be used: {broken.reason} ({broken.path})")


def show(
    model: Annotated[str, typer.Argument(help="As `list` names it.")],
    models_dir: ModelsDir = None,
    adapters_dir: AdaptersDir = None,
    as_json: AsJson = False,
) -> None:
    """Show everything that is known about a model."""
    config = configured(models_dir=models_dir, adapters_dir=adapters_dir)
    found = catalogue(config)
    checkpoint = found.get(model)
    if checkpoint is None:
        broken = next((u for u in found.unusable if u.id == model), None)
        if broken is not None:
            fail(f"{model} cannot be used: {broken.reason} ({broken.path})")
        names = ", ".join(m.id for m in found.models)
        fail(f"There is no model '{model}' here. " + (f"There is: {names}." if names else "There are no models yet."))
    told = _abilities(config, checkpoint)
    if as_json:
        print_json(asdict(checkpoint) | {"abilities": told})
        return
    print_table(list((_facts(checkpoint) | _can(told)).items()))


def _abilities(config: "Config", model: "Checkpoint") -> dict[str, Any] | None:
    """As the server tells them, of a model that writes."""
    # Of what takes long to import none is for `--help`.
    from mlx_manager.inference.abilities import abilities  # noqa: PLC0415
    from mlx_manager.protocols.openai.schema import OPTION_FIELDS  # noqa: PLC0415

    if model.kind not in ("text", "vision"):
        return None
    told = abilities(model, _found(config, model.id))
    return asdict(told) | {"options": [OPTION_FIELDS[option] for option in told.options]}


def _found(config: "Config", model: str) -> "Found":
    """What the server has found, as far as its database can be read: nothing is made or brought up to date for that."""
    if not config.database_path.exists():
        return {}
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415

    from mlx_manager.settings.findings import Findings  # noqa: PLC0415
    from mlx_manager.storage.database import Database  # noqa: PLC0415

    async def read() -> "Found":
        database = Database(config.database_path)
        findings = Findings(database)
        try:
            await findings.open()
        except DBAPIError:  # it is of an older version, or damaged: `serve` tells of that
            return {}
        finally:
            await database.close()
        return findings.of(model)

    return asyncio.run(read())


def _can(told: dict[str, Any] | None) -> dict[str, str]:
    if told is None:
        return {}
    can = {label(name): ability(told[name]) for name in CAPABILITIES}
    if told["tool_format"] is not None:
        can[label("tools")] += f", {told['tool_format'] or 'bare JSON'}"
    return can | {"Options": ", ".join(told["options"]) or "none"}


def _facts(model: "Checkpoint") -> dict[str, str]:
    adapter = model.adapter
    return {
        "Model": model.id,
        "Kind": model.kind + (" (its architecture is not supported)" if model.kind == "unsupported" else ""),
        "Architecture": model.architecture,
        "Parameters": f"{count(model.num_parameters)} ({model.num_parameters:,})",
        "Size": f"{size(model.size_bytes)} ({model.size_bytes:,} bytes)",
        "Context": "not said" if model.context_length is None else f"{tokens(model.context_length)} tokens",
        "Quantised": "no" if model.quantization_bits is None else f"to {model.quantization_bits} bits",
        "Created": datetime.fromtimestamp(model.created, UTC).astimezone().isoformat(sep=" ", timespec="minutes"),
        "Folder": str(model.path),
    } | ({} if adapter is None else {"Adapter": f"{adapter.form}, rank {adapter.rank}, scale {adapter.scale:g} ({adapter.path})"})


def _bits(model: "Checkpoint") -> str:
    return "-" if model.quantization_bits is None else str(model.quantization_bits)
