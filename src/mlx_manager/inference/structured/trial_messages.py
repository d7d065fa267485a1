"""What `trials` and its process say to each other. Sizes go first: a stream has no ends of messages."""

import socket
import struct

PASSED, FAILED = b"+", b"-"
PID = struct.Struct("!i")
TIME_LIMIT = struct.Struct("!d")  # seconds of the processor
WALL_FACTOR = 1.25  # of the clock for each of these
MAX_ANSWER_BYTES = 4 << 10
_SIZE = struct.Struct("!Q")


def send(to: socket.socket, message: bytes) -> None:
    to.sendall(_SIZE.pack(len(message)))
    to.sendall(message)


def received(source: socket.socket) -> bytes:
    """Raises `struct.error` for a message that is not whole."""
    (size,) = _SIZE.unpack(source.recv(_SIZE.size, socket.MSG_WAITALL))
    message = source.recv(size, socket.MSG_WAITALL)
    if len(message) < size:
        raise struct.error("the message ended early")
    return message
