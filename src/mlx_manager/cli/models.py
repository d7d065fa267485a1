"""`list` and `show`: what lies on this machine. No server is asked, and nothing is loaded."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_manager.cli.configuration import AdaptersDir, AsJson, ModelsDir, catalogue, configured
from mlx_manager.cli.terminal import count, fail, print_json, print_table, say, size, tokens, warn

if TYPE_CHECKING:
    from mlx_manager.hub.checkpoint import Checkpoint


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
    found = catalogue(configured(models_dir=models_dir, adapters_dir=adapters_dir))
    checkpoint = found.get(model)
    if checkpoint is None:
        broken = next((u for u in found.unusable if u.id == model), None)
        if broken is not None:
            fail(f"{model} cannot be used: {broken.reason} ({broken.path})")
        names = ", ".join(m.id for m in found.models)
        fail(f"There is no model '{model}' here. " + (f"There is: {names}." if names else "There are no models yet."))
    if as_json:
        print_json(asdict(checkpoint))
        return
    print_table(list(_facts(checkpoint).items()))


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
