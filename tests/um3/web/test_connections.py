"""Clients that send no request, or read no answer, over real sockets: they cannot block the page."""

import asyncio
import contextlib
import threading

import pytest

from tests.um3.web.conftest import half_open
from um3.web import connections
from um3.web import server as web_server
from um3.web.connections import MAX_CONNECTIONS
from um3.web.security import listen
from um3.web.server import build_app

UPLOAD = b"POST /api/caption HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9999\r\n\r\n"


@pytest.mark.parametrize("content", [b"", b"GET / HTTP/1.1\r\nX", UPLOAD])
def test_half_open_connections_do_not_block_the_page(server, content):
    silent = half_open(server.port, 2 * MAX_CONNECTIONS, content)
    assert server.request("GET", "/api/model").status == 200
    for connection in silent:
        connection.close()


@contextlib.contextmanager
def serving(app):
    """Serve an app in a thread of this process, and yield its port."""
    running, listener = web_server.make_server(app), listen("127.0.0.1", 0)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        running.should_exit = True
        thread.join()


@pytest.mark.parametrize(
    ("content", "more", "answer"),
    [
        (b"", b"", b""),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ", b"a", b""),
        (b"GET /absent HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999\r\n\r\n", b"a", b"HTTP/1.1 404"),
        (UPLOAD, b"", b"HTTP/1.1 408"),
        (UPLOAD, b"a", b"HTTP/1.1 408"),
    ],
    ids=["silent", "slow head", "body that is not read", "no body", "slow body"],
)
def test_a_request_that_does_not_arrive_ends_its_connection(content, more, answer, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.3)
    monkeypatch.setattr(web_server, "UPLOAD_TIMEOUT_S", 0.3)
    received, part = b"", b"no"
    with serving(build_app(None, sampling={}, max_waiting=1)) as port:
        (connection,) = half_open(port, 1, content)
        connection.settimeout(0.05)
        with contextlib.suppress(ConnectionError):
            while part:
                with contextlib.suppress(TimeoutError):
                    received += (part := connection.recv(65536))
                connection.sendall(more)
    assert received[:12] == answer


def test_a_client_that_reads_nothing_is_disconnected(monkeypatch):
    monkeypatch.setattr(connections, "READ_TIMEOUT_S", 0.3)
    disconnected = threading.Event()

    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not disconnected.is_set():
            await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})
            with contextlib.suppress(TimeoutError):
                message = await asyncio.wait_for(receive(), 0.01)
                disconnected.set() if message["type"] == "http.disconnect" else None

    with serving(endless) as port:
        (connection,) = half_open(port, 1, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert disconnected.wait(60)
        connection.close()
