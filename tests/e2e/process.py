"""The server as `mlx-manager serve` runs it, watched: whatever it asks of the world outside this machine is written down."""

import sys
from ipaddress import ip_address
from typing import Any


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "localhost", "127.0.0.1", "::1"):
        sys.stderr.write(f"OUTSIDE name {arguments[0]}\n")
    if event == "socket.connect" and isinstance(address := arguments[1], tuple) and not ip_address(address[0]).is_loopback:
        sys.stderr.write(f"OUTSIDE address {address[0]}\n")


if __name__ == "__main__":
    sys.addaudithook(_watch)

    # Before anything imports MLX: the BLAS that is loaded first is the one that it uses.
    from mlx_manager.inference.blas import use_fast_blas

    use_fast_blas()
    from mlx_manager.app import serve
    from mlx_manager.config import Config

    serve(Config())
