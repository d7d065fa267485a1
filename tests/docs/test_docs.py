"""What the documents name exists, and what exists is named."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import typer.main

from mlx_manager import app as application
from mlx_manager.cli import app as cli
from mlx_manager.config import Config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def test_every_setting_is_in_the_readme_and_every_documented_one_exists() -> None:
    settings = {f"MLX_MANAGER_{name.upper()}" for name in Config.model_fields}
    documented = set(re.findall(r"\bMLX_MANAGER_[A-Z_]+\b", README))
    assert documented == settings | {"MLX_MANAGER_BLAS"}


def test_every_command_is_in_the_readme() -> None:
    commands = set(typer.main.get_command(cli).commands)  # type: ignore[attr-defined]
    aliases = {"ls", "info", "chat", "unload"}
    named = set(re.findall(r"`(?:mlx-manager )?([a-z]+)(?: \[?[A-Z]+\]?)*`", README))
    assert commands - aliases <= named


def test_every_flag_of_serve_is_in_the_readme_and_every_documented_one_exists() -> None:
    serve = typer.main.get_command(cli).commands["serve"]  # type: ignore[attr-defined]
    flags = {option for parameter in serve.params for option in parameter.opts if option.startswith("--")}
    assert set(re.findall(r"^\| `MLX_MANAGER_\w+` \| `(--[a-z-]+)`", README, re.MULTILINE)) == flags - {"--help"}


def test_every_route_is_in_the_readme_and_every_documented_one_exists(tmp_path: Path) -> None:
    app = application.build(Config(data_dir=tmp_path))
    routes = {(method.upper(), path.replace("model_id", "id")) for path, methods in app.openapi()["paths"].items() for method in methods}
    documented = set(re.findall(r"`(GET|POST|PATCH|DELETE) (/[^`]*)`", README)) - {("GET", "/openapi.json")}
    assert documented == routes


def test_every_metric_is_documented_and_every_documented_one_exists(tmp_path: Path) -> None:
    metrics = application.build_services(Config(data_dir=tmp_path)).metrics
    exposed = set(re.findall(r"^# TYPE (\w+) (?!unknown)", metrics.render().decode(), re.MULTILINE))
    documented = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert documented == {name for name in exposed if not name.endswith("_created")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_architecture_names_every_package() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    packages = {path.name for path in (ROOT / "src" / "mlx_manager").iterdir() if (path / "__init__.py").exists()}
    assert {name for name in packages if f"{name}/" not in text} == set()


def test_the_page_of_clients_names_the_versions_that_the_tests_drive() -> None:
    external = ROOT / "tests" / "clients" / "external"
    page = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    wanted: dict[str, str] = {}
    for package in ("node", "agents"):
        wanted |= json.loads((external / package / "package.json").read_text())["dependencies"]
    del wanted["zod"]  # what the others describe their forms with
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    locked = {p["name"]: p["version"] for p in lock["package"]}
    python = {name: locked[name] for name in ("langchain-openai", "langchain-anthropic", "pydantic-ai-slim", "openai", "anthropic")}
    older = re.findall(r'"(openai|anthropic|instructor)==([\d.]+)"', (external / "test_python.py").read_text())
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert [(n, v) for n, v in [*wanted.items(), *python.items(), *older] if not any(f"`{n}`" in r and v in r for r in rows)] == []
