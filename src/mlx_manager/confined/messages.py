"""What both sides say to each other over sockets. Sizes go first: a stream has no ends of messages."""

import socket
import struct

# A fork begins with who it is.
PID = struct.Struct("!i")
TIME_LIMIT = struct.Struct("!d")  # seconds of the processor
WALL_FACTOR = 1.25  # of the clock for each of these, for a busy machine
_SIZE = struct.Struct("!Q")


def send(to: socket.socket, message: bytes) -> None:
    to.sendall(_SIZE.pack(len(message)))
    to.sendall(message)


def received(source: socket.socket) -> bytes:
    """Raises `struct.error` for a message that is not whole."""
    (size,) = _SIZE.unpack(source.recv(_SIZE.size, socket.MSG_WAITALL))
    message = source.recv(size, socket.MSG_WAITALL) if size else b""
    if len(message) < size:
        raise struct.error("the message ended early")
    return message
