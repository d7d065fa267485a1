"""`status`: what a running server is doing."""

from typing import Any

from mlx_manager.cli.configuration import AsJson, ServerUrl, asked
from mlx_manager.cli.terminal import print_json, print_table, say, size, tokens


def status(
    host: ServerUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show what a running server is doing; its key, if it has one, is taken from MLX_MANAGER_API_KEY."""
    with asked(host) as server:
        told = server.status()
    if as_json:
        print_json(told)
        return
    num = told["num_in_flight"]
    say(
        f"MLX Manager {told['version']} at {server.url}: {'shutting down, ' if told['draining'] else ''}"
        f"{num} request{'' if num == 1 else 's'} under way"
    )
    if told["models"]:
        _print_models(told["models"])


def _print_models(models: list[dict[str, Any]]) -> None:
    print_table(
        [
            (
                m["id"],
                m["state"],
                str(m["num_running"]),
                str(m["num_waiting"]),
                size(m["size_bytes"]),
                tokens(m["context_length"]),
                _cache(m.get("kv_cache")),
                m["error"] or "",
            )
            for m in models
        ],
        columns=("Model", "State", "Running", "Waiting", "Size", "Context", "Keys and values", ""),
        numbers=("Running", "Waiting", "Size", "Context"),
    )


def _cache(cache: dict[str, Any] | None) -> str:
    """How a loaded model keeps keys and values, how full that is with replies under way, and with what is kept for others."""
    if cache is None:
        return ""
    held, kept = (100 * cache[n] // cache["num_blocks"] for n in ("num_held", "num_cached"))
    return f"{cache['kind']}, {held} % in use, {kept} % kept"
