"""`doctor`: what is right and wrong with this machine and installation."""
# ruff: noqa: PLC0415 - it looks at everything, so it imports everything

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from mlx_manager.cli.configuration import AsJson, ModelsDir, address, catalogue, configured
from mlx_manager.cli.terminal import FAILED, print_json, print_table

STYLE = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the database. [env: MLX_MANAGER_DATA_DIR]")] = None,
    models_dir: ModelsDir = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine and installation; exit code 1 if something keeps the server from working."""
    from rich.text import Text

    from mlx_manager.cli.remote import is_us
    from mlx_manager.doctor import examine
    from mlx_manager.inference.blas import use_fast_blas

    config = configured(data_dir=data_dir, models_dir=models_dir)
    blas = use_fast_blas()
    checks = examine(data_dir=config.data_dir, host=config.host, port=config.port, models=catalogue(config), blas=blas)
    url = address(config.host, config.port)
    for position, check in enumerate(checks):
        if check.name == "Port" and check.status == "fail" and is_us(url):
            checks[position] = replace(check, status="ok", found=f"MLX Manager is running at {url}", fix=None)
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        print_table([(Text(c.status, STYLE[c.status]), c.name, c.found + (f"\n→ {c.fix}" if c.fix else "")) for c in checks])
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(FAILED)
