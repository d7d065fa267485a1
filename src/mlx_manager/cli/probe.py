"""`probe`: a running server asks a model what it can do."""

from typing import Annotated
from urllib.parse import quote

import typer

from mlx_manager.cli.configuration import AsJson, ServerUrl, asked
from mlx_manager.cli.terminal import ability, label, print_json, print_table
from mlx_manager.core.capabilities import CAPABILITIES

# It may have to be loaded first.
TIMEOUT_S = 3600.0


def probe(
    model: Annotated[str, typer.Argument(help="As `list` names it.")],
    host: ServerUrl = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model for a tool call, a thought and what it sees, and keep what came of it."""
    with asked(host) as server:
        told = server.ask("POST", f"/api/models/{quote(model, safe='/:')}/probe", timeout_s=TIMEOUT_S)
    if as_json:
        print_json(told)
    else:
        print_table([(label(name), ability(told[name]), told[name]["detail"]) for name in CAPABILITIES])
