"""The server as `mlx-manager serve` runs it, with a witness in front: what clients of others sent, and what they got.

A line of JSON an exchange goes to the file that `CLIENTS_WITNESS` names, once its reply has ended.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Witness:
    """Outside of everything that answers, so it sees the reply as it goes out."""

    def __init__(self, app: ASGIApp, path: Path) -> None:
        self.app = app
        self.path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked, reply = bytearray(), bytearray()
        started: Message = {"status": 0, "headers": []}
        begin = time.monotonic()

        async def receive_seen() -> Message:
            message = await receive()
            asked.extend(message.get("body", b""))
            return message

        async def send_seen(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = message
            reply.extend(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive_seen, send_seen)
        finally:
            query = scope["query_string"].decode()
            seen: dict[str, Any] = {
                "method": scope["method"],
                "path": scope["path"] + (f"?{query}" if query else ""),
                "headers": {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]},
                "request": asked.decode("utf-8", "replace"),
                "status": started["status"],
                "reply_headers": {k.decode("latin-1"): v.decode("latin-1") for k, v in started["headers"]},
                "reply": reply.decode("utf-8", "replace"),
                "seconds": time.monotonic() - begin,
            }
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    # Before anything imports MLX: the BLAS that is loaded first is the one that it uses.
    from mlx_manager.inference.blas import use_fast_blas

    use_fast_blas()
    from mlx_manager import app
    from mlx_manager.config import Config

    config = Config()
    logging.basicConfig(level=config.log_level.upper())
    application = app.build(config)
    application.add_middleware(Witness, path=Path(os.environ["CLIENTS_WITNESS"]))
    app.Server(application, config).run()
