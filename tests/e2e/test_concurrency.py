"""Many at once, and clients that leave: what they held is free again, and nobody else notices."""

import json
import random
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.serving import MODEL, Running

PROMPTS = ["Say apple forever.", "Hello", "Count from 1 to 20.", "Repeat after me: green tea"]
FOR_EVER = {"model": MODEL, "prompt": "apple apple", "max_tokens": 4000, "temperature": 0, "logit_bias": {"300": 100}}
FREE_WITHIN_S = 2.0
"""By then a sequence must be gone; the test waits longer where the machine is busy with something else."""
PATIENCE_S = 15.0


def events(body: str) -> list[dict[str, Any]]:
    *frames, done = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(frame) for frame in frames]


def text_of(server: Running, prompt: str) -> str:
    request = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 40,
        "temperature": 0,
        "stream": True,
        "enable_thinking": False,
    }
    with server.http() as http:
        response = http.post("/v1/chat/completions", json=request)
    return "".join(e["choices"][0]["delta"].get("content", "") for e in events(response.text))


def test_sixteen_streams_at_once_say_what_each_says_alone_and_share_their_passes(server: Running) -> None:
    alone = {prompt: text_of(server, prompt) for prompt in PROMPTS}
    steps = server.metric("mlx_manager_decode_steps_total", model=MODEL)
    tokens = server.metric("mlx_manager_decoded_tokens_total", model=MODEL)
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda i: text_of(server, PROMPTS[i % len(PROMPTS)]), range(16)))
    assert together == [alone[PROMPTS[i % len(PROMPTS)]] for i in range(16)]
    num_steps = server.metric("mlx_manager_decode_steps_total", model=MODEL) - steps
    num_tokens = server.metric("mlx_manager_decoded_tokens_total", model=MODEL) - tokens
    assert num_tokens / num_steps > 3
    assert server.is_idle()


def send(server: Running, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    client = server.connect()
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    client.sendall(head.encode() + content)
    return client


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def wait_until_running(server: Running, count: int = 1) -> None:
    while server.metric("mlx_manager_running_sequences") < count:
        pass


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["FIN", "RST"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(server: Running, stream: bool, leave: Any) -> None:
    cancelled = server.metric("mlx_manager_requests_total", outcome="cancelled")
    client = send(server, FOR_EVER | {"stream": stream, "n": 2})
    if stream:
        assert client.recv(65536)
        assert client.recv(65536)
    wait_until_running(server, 2)
    leave(client)
    server.wait_until_idle(within_s=FREE_WITHIN_S)
    assert server.metric("mlx_manager_requests_total", outcome="cancelled") == cancelled + 1


def test_a_client_that_leaves_before_its_first_token_frees_its_place(server: Running) -> None:
    client = send(server, FOR_EVER | {"prompt": [300] * 3900, "stream": True})
    wait_until_running(server)
    reset(client)
    server.wait_until_idle(within_s=PATIENCE_S)


def test_clients_that_leave_at_any_moment_leave_nothing_behind(server: Running) -> None:
    dice = random.Random(0)
    for i in range(30):
        client = send(server, FOR_EVER | {"stream": i % 3 != 0, "n": dice.randint(1, 3)})
        client.settimeout(dice.choice([0.001, 0.01, 0.05, 0.1]))
        try:
            for _ in range(dice.randint(0, 5)):
                client.recv(65536)
        except TimeoutError:
            pass
        reset(client)
    # Also in the middle of a body that never comes.
    client = server.connect()
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    reset(client)
    server.wait_until_idle(within_s=PATIENCE_S)
    assert text_of(server, PROMPTS[0])


@pytest.fixture(autouse=True, scope="module")
def _nothing_goes_wrong_in_the_log(server: Running) -> Any:
    before = len(server.log)
    yield
    written = server.log[before:]
    assert "ERROR" not in written
    assert "Traceback" not in written
