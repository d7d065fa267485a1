"""A proxy that lets nobody out and remembers who wanted to: what a client asks of the world when all that it needs is on this machine."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Outside(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Refusal)
        self.asked: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Refusal(socketserver.StreamRequestHandler):
    server: Outside

    def handle(self) -> None:
        words = self.rfile.readline(4096).split()
        if len(words) == 3:
            self.server.asked.add(words[1].decode("ascii", "replace"))
        self.wfile.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")


@contextmanager
def nobody_gets_out() -> Iterator[Outside]:
    with Outside() as outside:
        thread = threading.Thread(target=outside.serve_forever, name="outside")
        thread.start()
        try:
            yield outside
        finally:
            outside.shutdown()
            thread.join()
