import asyncio
import os
import socket
import sys
from pathlib import Path

import pytest

from mlx_manager.bench.load import measure
from mlx_manager.bench.peers import PEERS, Peer, peer_server
from mlx_manager.bench.processes import PeerError
from mlx_manager.bench.results import Workload

FAKE = """
import json, os, sys, time
if sys.argv[1] == "-c":
    sys.exit(print("mlx-lm 1.2, mlx 3.4"))
from http.server import BaseHTTPRequestHandler, HTTPServer
print("arguments:", sys.argv[1:], "preload:", os.environ.get("LD_PRELOAD"), flush=True)
class Fake(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert asked["model"] in ("default_model", *sys.argv)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        chunk = {"choices": [{"delta": {"content": "hi"}, "finish_reason": "length"}]}
        self.wfile.write(f": keepalive 1/1\\n\\ndata: {json.dumps(chunk)}\\n\\ndata: [DONE]\\n\\n".encode())
time.sleep(0.3)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Fake).serve_forever()
"""


MLX_LM = PEERS["mlx-lm"]


def python_that_runs(text: str, folder: Path) -> str:
    """A stand-in for the interpreter, so that no model has to be loaded to test how a peer is started and ended."""
    (folder / "fake.py").write_text(text)
    stand_in = folder / "python"
    stand_in.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder}/fake.py" "$@"\n')
    stand_in.chmod(0o755)
    return str(stand_in)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kept_in(folder: Path) -> list[Path]:
    return list(folder.glob("*"))


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_a_peer_is_a_target_once_it_answers_and_is_gone_afterwards(tmp_path: Path, port: int) -> None:
    async with peer_server(
        MLX_LM, tmp_path, port, python=python_that_runs(FAKE, tmp_path), options=("--decode-concurrency", "8")
    ) as target:
        assert (target.name, target.url, target.model) == ("mlx-lm", f"http://127.0.0.1:{port}", "default_model")
        started = f"-m mlx_lm server --model {tmp_path} --host 127.0.0.1 --port {port} --decode-concurrency 8 (mlx-lm 1.2, mlx 3.4)"
        assert target.flags.endswith(started)
        cell = await measure(target, Workload(8, 16, 1, 2), ["a", "b", "c"])
        assert [sample.error for sample in cell.samples] == [None, None]
    assert not is_open(port)


@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
async def test_every_peer_is_asked_for_the_model_it_was_started_with(peer: Peer, tmp_path: Path, port: int) -> None:
    async with peer_server(peer, tmp_path, port, python=python_that_runs(FAKE, tmp_path)) as target:
        assert target.name == peer.name
        assert target.model in ("default_model", str(tmp_path))
        assert str(tmp_path) in target.flags


async def test_what_a_peer_keeps_in_its_home_is_gone_with_it(tmp_path: Path, port: int) -> None:
    keeping = f"import os; open(r'{tmp_path}/home', 'w').write(os.environ['HOME']); open(os.path.expanduser('~/kept'), 'w').close()\n"
    async with peer_server(MLX_LM, tmp_path, port, python=python_that_runs(keeping + FAKE, tmp_path)):
        home = Path((tmp_path / "home").read_text())
        assert [child.name for child in kept_in(home)] == ["kept"]
    assert home != Path.home()
    assert kept_in(home) == []


async def test_a_python_that_is_not_there_is_said(tmp_path: Path, port: int) -> None:
    with pytest.raises(PeerError, match="cannot be started: No such file"):
        async with peer_server(MLX_LM, tmp_path, port, python=str(tmp_path / "nothing")):
            pass


async def test_a_peer_is_ended_when_the_comparison_fails(tmp_path: Path, port: int) -> None:
    with pytest.raises(RuntimeError, match="ours broke"):
        async with peer_server(MLX_LM, tmp_path, port, python=python_that_runs(FAKE, tmp_path)):
            raise RuntimeError("ours broke")
    assert not is_open(port)


async def test_a_peer_that_ends_at_once_is_reported_with_its_last_words(tmp_path: Path, port: int) -> None:
    python = python_that_runs("import sys; sys.exit('no such model')", tmp_path)
    with pytest.raises(PeerError, match="ended with status 1: no such model"):
        async with peer_server(MLX_LM, tmp_path, port, python=python):
            pass


async def test_a_peer_that_never_answers_is_given_up_and_ended(tmp_path: Path, port: int) -> None:
    python = python_that_runs(f"import os, time; open(r'{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(60)", tmp_path)
    with pytest.raises(PeerError, match="does not answer within 1 s"):
        async with peer_server(MLX_LM, tmp_path, port, python=python, start_s=1.0):
            pass
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_port_that_somebody_else_answers_on_is_refused(tmp_path: Path) -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        with pytest.raises(PeerError, match="is in use"):
            async with peer_server(MLX_LM, tmp_path, server.sockets[0].getsockname()[1]):
                pass


async def test_a_peer_is_not_measured_with_another_blas_than_ours(tmp_path: Path, port: int) -> None:
    with pytest.raises(PeerError, match="there is no BLAS"):
        async with peer_server(MLX_LM, tmp_path, port, blas_path=tmp_path / "missing.so"):
            pass
    if sys.platform == "linux":
        no_library = tmp_path / "libnothing.so"  # the dynamic linker passes over it with a warning
        no_library.touch()
        with pytest.raises(PeerError, match="runs without libnothing"):
            async with peer_server(MLX_LM, tmp_path, port, blas_path=no_library, python=python_that_runs(FAKE, tmp_path)):
                pass
