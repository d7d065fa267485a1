"""`profiles` and `alias`: the names under which a running server is asked for its models."""

from typing import Annotated, Any
from urllib.parse import quote

import typer

from mlx_manager.cli.configuration import AsJson, ServerUrl, asked
from mlx_manager.cli.terminal import USAGE, fail, label, print_json, print_table, say

profiles = typer.Typer(help="Named ways to ask a model, for every client: model:profile.", invoke_without_command=True)
alias = typer.Typer(help="Free names for models and profiles.", invoke_without_command=True)

Id = Annotated[str, typer.Argument(metavar="MODEL:PROFILE", help="As clients ask for it.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="As clients ask for it.")]
NOT_SET = ("id", "model", "name", "version", "available")
"""What a profile has and `set` does not change."""


@profiles.callback()
def list_unless_told_otherwise(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_profiles()


@profiles.command("list")
def list_profiles(host: ServerUrl = None, as_json: AsJson = False) -> None:
    """List the profiles."""
    told = _ask(host, "GET", "/api/profiles")
    if as_json:
        print_json(told)
    elif told["profiles"]:
        rows = [(p["id"], ", ".join(_presets(p)) or "nothing", _first_line(p["description"]), _absent(p)) for p in told["profiles"]]
        print_table(rows, columns=("Profile", "Says", "", ""))
    else:
        say("No profiles yet. Make one with: mlx-manager profiles set MODEL:PROFILE --temperature 0.2")


@profiles.command("show")
def show_profile(profile: Id, host: ServerUrl = None, as_json: AsJson = False) -> None:
    """Show all that a profile says."""
    told = _ask(host, "GET", _path("profiles", profile))
    if as_json:
        print_json(told)
        return
    facts = {"Profile": told["id"], "Version": str(told["version"])}
    for name, value in {"description": told["description"], **_presets(told), "available": _absent(told)}.items():
        if value != "":
            facts[label(name)] = str(value)
    print_table(list(facts.items()))


@profiles.command("set")
def set_profile(
    profile: Id,
    description: Annotated[str | None, typer.Option(metavar="TEXT", help="What it is for.")] = None,
    adapter: Annotated[str | None, typer.Option(metavar="NAME", help="The model's adapter to use.")] = None,
    system_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="For requests that have none.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    presence_penalty: Annotated[float | None, typer.Option()] = None,
    frequency_penalty: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of a reply.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Ends a reply; can be repeated.")] = None,
    enable_thinking: Annotated[bool | None, typer.Option("--enable-thinking/--no-enable-thinking")] = None,
    reasoning_effort: Annotated[str | None, typer.Option(metavar="LEVEL", help="none, minimal, low, medium, high, xhigh or max.")] = None,
    thinking_budget: Annotated[int | None, typer.Option(help="Tokens of reasoning.")] = None,
    context_limit: Annotated[int | None, typer.Option(help="Tokens of prompt and reply together.")] = None,
    unset: Annotated[
        list[str] | None, typer.Option(metavar="FIELD", help="What it no longer says, as system_prompt; can be repeated.")
    ] = None,
    host: ServerUrl = None,
    as_json: AsJson = False,
) -> None:
    """Make a profile, or change what is given of one."""
    given = {name: value for name, value in locals().items() if name not in ("profile", "unset", "host", "as_json")}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None and value != []}
    for name in unset or []:
        if name not in given:
            fail(f"There is no '{name}' to unset. There is: {', '.join(given)}.", USAGE)
        changes[name] = None
    model, colon, name = profile.partition(":")
    if not colon:
        fail(f"'{profile}' is not a model and a profile: qwen3:terse.", USAGE)
    told = _put("profiles", profile, {"model": model, "name": name}, changes, host)
    if as_json:
        print_json(told)
    else:
        say(f"{told['id']} says: {', '.join(_presets(told)) or 'nothing'}." + _sentence(told))


@profiles.command("rm")
def remove_profile(profile: Id, host: ServerUrl = None) -> None:
    """Delete a profile."""
    _ask(host, "DELETE", _path("profiles", profile))
    say(f"{profile} is gone.")


@alias.callback()
def list_aliases_unless_told_otherwise(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_aliases()


@alias.command("list")
def list_aliases(host: ServerUrl = None, as_json: AsJson = False) -> None:
    """List the aliases."""
    told = _ask(host, "GET", "/api/aliases")
    if as_json:
        print_json(told)
    elif told["aliases"]:
        print_table([(a["name"], a["target"], _absent(a)) for a in told["aliases"]], columns=("Alias", "Stands for", ""))
    else:
        say("No aliases yet. Make one with: mlx-manager alias set NAME MODEL")


@alias.command("show")
def show_alias(name: Name, host: ServerUrl = None, as_json: AsJson = False) -> None:
    """Show what an alias stands for."""
    told = _ask(host, "GET", _path("aliases", name))
    if as_json:
        print_json(told)
    else:
        say(f"{told['name']} stands for {told['target']}." + _sentence(told))


@alias.command("set")
def set_alias(
    name: Name,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A model, model:profile or model:adapter.")],
    host: ServerUrl = None,
    as_json: AsJson = False,
) -> None:
    """Make an alias, or let it stand for something else."""
    told = _put("aliases", name, {"name": name}, {"target": target}, host)
    if as_json:
        print_json(told)
    else:
        say(f"{told['name']} stands for {told['target']}." + _sentence(told))


@alias.command("rm")
def remove_alias(name: Name, host: ServerUrl = None) -> None:
    """Delete an alias; what it stands for stays."""
    _ask(host, "DELETE", _path("aliases", name))
    say(f"{name} is gone.")


def _ask(host: str | None, method: str, path: str) -> dict[str, Any]:
    with asked(host) as server:
        return server.ask(method, path)


def _put(kind: str, name: str, identity: dict[str, str], changes: dict[str, Any], host: str | None) -> dict[str, Any]:
    """A new one, or what is there with the changes; if somebody else changes it in between, nothing."""
    from mlx_manager.cli.remote import Refused  # noqa: PLC0415 - an HTTP client is not for `--help`

    with asked(host) as server:
        try:
            before = server.ask("GET", _path(kind, name))
        except Refused as error:
            if error.status != 404:
                raise
            return server.ask("POST", f"/api/{kind}", identity | changes)
        kept = {field: value for field, value in before.items() if field not in NOT_SET}
        return server.ask("PUT", _path(kind, name), kept | changes | {"version": before["version"]})


def _path(kind: str, name: str) -> str:
    return f"/api/{kind}/{quote(name, safe='/:')}"


def _presets(profile: dict[str, Any]) -> dict[str, Any]:
    """What it says for clients."""
    return {name: value for name, value in profile.items() if name not in (*NOT_SET, "description") and value is not None}


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _absent(told: dict[str, Any]) -> str:
    return "" if told["available"] else "not on this machine yet"


def _sentence(told: dict[str, Any]) -> str:
    return "" if told["available"] else " That model is not on the server's machine yet."
