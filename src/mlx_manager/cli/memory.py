"""`load`, `stop` and `ps`: the models in a running server's memory."""

import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.status import Status

from mlx_manager.cli.configuration import AsJson, ServerUrl, asked
from mlx_manager.cli.terminal import USAGE, errors, fail, print_json, print_table, say, size, tokens

Model = Annotated[str, typer.Argument(help="As `list` names it.")]


def load(
    model: Model,
    pin: Annotated[bool | None, typer.Option("--pin/--unpin", help="Whether it may leave for another model.")] = None,
    keep_alive: Annotated[str | None, typer.Option(metavar="TIME", help="How long it stays when nobody uses it: 5m, 0, -1.")] = None,
    host: ServerUrl = None,
    as_json: AsJson = False,
) -> None:
    """Load a model into a running server's memory, and wait until it is there."""
    options = {name: value for name, value in (("pinned", pin), ("keep_alive", keep_alive)) if value is not None}
    ready: dict[str, Any] | None = None
    _check_name(model)
    with asked(host) as server, errors().status(f"Loading {model}", spinner="dots") as shown:
        for name, told in server.load(model, options):
            if name == "ready":
                ready = told
            elif name == "failed":
                shown.stop()
                fail(told["detail"])
            else:
                _show(shown, told)
    if ready is None:
        fail(f"The server ended before {model} was loaded.")
    if as_json:
        print_json(ready)
    else:
        say(f"{model} is loaded ({ready['load_s']:.1f} s) and takes up to {size(_bytes(ready))}.")


def stop(model: Model, host: ServerUrl = None, as_json: AsJson = False) -> None:
    """Take a model out of a running server's memory, after the replies that it is writing."""
    _check_name(model)
    with asked(host) as server:
        told = server.unload(model)
    if as_json:
        print_json(told)
    else:
        say(f"{model} is not in memory.")


def ps(host: ServerUrl = None, as_json: AsJson = False) -> None:
    """Show which models are in a running server's memory, and what they take of it."""
    with asked(host) as server:
        told = server.models()
    if as_json:
        print_json(told)
        return
    there = [m for m in told["models"] if m["memory"] is not None or m["state"] == "queued"]
    memory = told["memory"]
    say(f"{size(memory['taken'])} of {size(memory['limit'])} taken" + (f"; {', '.join(memory['relief'])}" if memory["relief"] else ""))
    if there:
        print_table(
            [(m["id"], _state(m), *_parts(m), tokens(m["context_length"]), str(m["busy"]), _until(m)) for m in there],
            columns=("Model", "State", "Weights", "Keys and values", "Prefill", "Context", "Busy", "Until"),
            numbers=("Weights", "Keys and values", "Prefill", "Context", "Busy"),
        )


def _check_name(model: str) -> None:
    if not model.strip() or "?" in model or "#" in model:
        fail(f"'{model}' is no name of a model.", USAGE)


def _show(shown: Status, told: Mapping[str, Any]) -> None:
    match told["phase"]:
        case "queued" if "needed_bytes" in told:
            what = f"waits for memory: needs {size(told['needed_bytes'])}, {size(told['available_bytes'])} are free"
        case "loading" if told["total_bytes"]:
            what = f"{size(told['read_bytes'])} of {size(told['total_bytes'])}"
        case phase:
            what = str(phase)
    shown.update(f"Loading {told['model']}: {what}")


def _bytes(model: Mapping[str, Any]) -> int:
    memory = model["memory"]
    return 0 if memory is None else sum(memory[part] for part in ("weights", "adapter", "kv", "prefill"))


def _parts(model: Mapping[str, Any]) -> tuple[str, str, str]:
    memory = model["memory"]
    if memory is None:
        return "-", "-", "-"
    return size(memory["weights"] + memory["adapter"]), f"{size(memory['kv_in_use'])} of {size(memory['kv'])}", size(memory["prefill"])


def _state(model: Mapping[str, Any]) -> str:
    return model["state"] + (", pinned" if model["pinned"] else "")


def _until(model: Mapping[str, Any]) -> str:
    """Until it is unloaded, if nobody uses it."""
    if model["expires_at"] is None:
        return "-" if model["keep_alive_s"] is not None else "for ever"
    left_s = max(0, model["expires_at"] - time.time())
    return f"{left_s / 60:.0f} min" if left_s >= 90 else f"{left_s:.0f} s"
