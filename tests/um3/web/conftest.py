"""A real `um3 serve` over a small model whose images take long enough to be cancelled."""

import base64
import contextlib
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from tests.helpers.tiny_qlip import make_qlip
from tests.helpers.tiny_um3 import save_um3
from um3.inference.pipeline import UM3Pipeline

SIDE = 4
"""Rows of patches in an image of 32 pixels."""
MAX_WAITING = 7
ROOT = Path(__file__).parents[3]


class Answer(NamedTuple):
    """An answer of the server; `events` are its lines."""

    status: int
    headers: dict[str, str]
    events: list[dict[str, Any]]


class Server(NamedTuple):
    """A running server."""

    port: int
    process: subprocess.Popen[str]
    log: Path
    token: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """Send bytes as they are and anything else as JSON; read the answer's JSON lines."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, content, dict(headers or {}))
        response = connection.getresponse()
        lines = response.read().decode().splitlines()
        connection.close()
        is_json = "json" in (response.getheader("content-type") or "")
        return Answer(response.status, dict(response.getheaders()), [json.loads(line) for line in lines if is_json])


def opened(content: str) -> Image.Image:
    """The image in base64, or in the URL of one."""
    return Image.open(io.BytesIO(base64.b64decode(content.rpartition(",")[2])))


def half_open(port: int, count: int, content: bytes) -> list[socket.socket]:
    """Connections that send `content`, and nothing more."""
    connections = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(count)]
    for connection in connections:
        with contextlib.suppress(OSError):  # ended already
            connection.sendall(content)
    return connections


@pytest.fixture(scope="session")
def web_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved UM3 with random weights: 16 codes of 28 bits, 64 tokens per image."""
    sizes = {"hidden_size": 64, "num_layers": 4, "head_dim": 16, "intermediate_size": 96}
    folder = tmp_path_factory.mktemp("web")
    qlip_folder = make_qlip(folder / "qlip", image_size=32, patch_size=32 // SIDE, bits=28)
    return save_um3(folder, qlip_folder=qlip_folder, max_position_embeddings=512, **sizes)


@pytest.fixture(scope="session")
def web_pipeline(web_model: Path) -> UM3Pipeline:
    """The pipeline of the server."""
    return UM3Pipeline.from_pretrained(web_model)


@pytest.fixture(scope="session")
def server(web_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`um3 serve` in its own process, on a free port."""
    with serving(web_model, tmp_path_factory.mktemp("log")) as server:
        yield server


@contextlib.contextmanager
def serving(web_model: Path, folder: Path, *options: str) -> Iterator[Server]:
    """`um3 serve` in its own process, on a free port, with more options."""
    log = folder / "stderr.txt"
    script = "from um3.cli import entry_point; entry_point()"
    command = [sys.executable, "-c", script, "serve", "--port", "0", "--no-open", "--model", str(web_model)]
    command += ["--device", "cpu", "--most-waiting", str(MAX_WAITING), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=log.parent, env=environment
        )
        assert process.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:(\d+)(?:/\?token=(\S+))?", process.stdout.readline())
        assert address, log.read_text()
        yield Server(port=int(address[1]), process=process, log=log, token=address[2] or "")
        process.terminate()
        assert process.wait(timeout=60) == 0, log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()
