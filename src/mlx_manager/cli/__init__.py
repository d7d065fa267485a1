"""The `mlx-manager` command: one module a command or two, and what they share.

`--help` and the small commands answer at once: whatever takes long to import (pydantic, MLX, the server) is imported by the command
that needs it, when it runs.
"""

import os
from importlib.metadata import version
from typing import Annotated

import typer

from mlx_manager.cli.bench import bench
from mlx_manager.cli.chat import run
from mlx_manager.cli.examine import doctor
from mlx_manager.cli.hub import pull, rm, search
from mlx_manager.cli.memory import load, ps, stop
from mlx_manager.cli.models import list_models, show
from mlx_manager.cli.presets import alias, profiles
from mlx_manager.cli.probe import probe
from mlx_manager.cli.serve import serve
from mlx_manager.cli.status import status

app = typer.Typer(
    name="mlx-manager",
    help="Run language models on your own machine with MLX: one server, the OpenAI API, continuous batching.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no server is running.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # its tracebacks print the values of variables, keys among them
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool = True) -> None:
    """Print the version."""
    if wanted:
        typer.echo(f"mlx-manager {version('mlx-manager')}")
        raise typer.Exit


@app.callback()
def start(
    _: Annotated[bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)] = False,
) -> None:
    # Logfire plugs into pydantic, which we do not use, and would make every command a second slower.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "logfire-plugin")
    # transformers says that it misses PyTorch, which it does not for what we ask of it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


app.command("serve")(serve)
app.command("run")(run)
app.command("chat", hidden=True, help="Same as run.")(run)
app.command("list")(list_models)
app.command("ls", hidden=True, help="Same as list.")(list_models)
app.command("show")(show)
app.command("info", hidden=True, help="Same as show.")(show)
app.add_typer(profiles, name="profiles")
app.add_typer(alias, name="alias")
app.command("probe")(probe)
app.command("search")(search)
app.command("pull")(pull)
app.command("rm")(rm)
app.command("status")(status)
app.command("load")(load)
app.command("stop")(stop)
app.command("unload", hidden=True, help="Same as stop.")(stop)
app.command("ps")(ps)
app.command("doctor")(doctor)
app.command("bench")(bench)


@app.command("version")
def version_command() -> None:
    """Print the version."""
    print_version()
