"""From flags and environment to a `Config`, and what follows from one: the models it finds, the address it has."""
# ruff: noqa: PLC0415 - Config is pydantic, which takes a while to import: `--help` does without

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_manager.cli.terminal import FAILED, NO_SERVER, USAGE, fail, warn

if TYPE_CHECKING:
    from mlx_manager.cli.remote import Server
    from mlx_manager.config import Config
    from mlx_manager.hub.checkpoint import Checkpoint
    from mlx_manager.hub.client import Hub
    from mlx_manager.hub.local import Catalogue

ModelsDir = Annotated[
    list[Path] | None,
    typer.Option(
        "--models-dir",
        metavar="DIR",
        exists=True,
        file_okay=False,
        help="Folder whose subfolders are models; can be repeated. [env: MLX_MANAGER_MODELS_DIR]",
    ),
]
AdaptersDir = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapters-dir",
        metavar="DIR",
        exists=True,
        file_okay=False,
        help="Folder whose subfolders are LoRA adapters; can be repeated. [env: MLX_MANAGER_ADAPTERS_DIR]",
    ),
]
ServerUrl = Annotated[str | None, typer.Option("--host", metavar="URL", help="Where the server is. [default: http://127.0.0.1:10242]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]


def configured(**flags: object) -> "Config":
    """Flags that were given beat the environment, which beats the defaults. Ends the command if a value is no good."""
    from pydantic import ValidationError

    from mlx_manager.config import Config

    given = {name: value for name, value in flags.items() if value is not None and value != []}
    try:
        config = Config.model_validate({}) if not given else Config(**given)  # pyright: ignore[reportArgumentType] - validated there
    except ValidationError as error:
        fail("\n".join(_complaint(str(e["loc"][0]), e["msg"]) for e in error.errors(include_input=False)), USAGE)
    for folder in config.models_dir:
        if not folder.is_dir():
            warn(f"There is no models folder {folder}.")
    for folder in config.adapters_dir:
        if not folder.is_dir():
            warn(f"There is no adapters folder {folder}.")
    return config


@contextmanager
def asked(host: str | None) -> "Generator[Server]":
    """The server at an address, or where this machine's would be. Ends the command if it does not answer, or not as it was asked to."""
    from mlx_manager.cli.remote import NoAnswer, Refused, Server

    config = configured()
    url = address(config.host, config.port) if host is None else host if "://" in host else f"http://{host}"
    try:
        yield Server(url, config.api_key.get_secret_value() if config.api_key else None)
    except NoAnswer as error:
        fail(str(error), NO_SERVER)
    except Refused as error:
        fail(str(error), FAILED)


def _complaint(field: str, message: str) -> str:
    return f"{field} (--{field.replace('_', '-')} or MLX_MANAGER_{field.upper()}): {message}."


def catalogue(config: "Config") -> "Catalogue":
    """Every model on this machine, as the server finds them, without importing the server."""
    from mlx_manager.hub.local import all_models

    return all_models(config)


def hub(config: "Config") -> "Hub":
    """The Hub that is configured. Ends the command if its address is none."""
    from mlx_manager.hub.client import Hub

    try:
        return Hub.of(config.hub_endpoint, timeout_s=config.hub_timeout_s)
    except ValueError as error:
        fail(f"hub_endpoint (--hub-endpoint, MLX_MANAGER_HUB_ENDPOINT or HF_ENDPOINT): {error}.", USAGE)


def is_starter(model: "Checkpoint") -> bool:
    from mlx_manager.config import BUNDLED_MODELS

    return model.path.is_relative_to(BUNDLED_MODELS)


def starter(models: "Sequence[Checkpoint]") -> "Checkpoint | None":
    """The model to talk to when none is named: the one that comes with the package, or the only one there is."""
    chatty = [model for model in models if model.kind == "text" and model.adapter is None]
    return next((model for model in chatty if is_starter(model)), chatty[0] if len(chatty) == 1 else None)


def address(host: str, port: int) -> str:
    """Where a program on this machine reaches a server that listens there."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
