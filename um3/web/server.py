"""The server: the page, what it may know of the model, and two calls that draw and look.

Answers to the calls are JSON lines, one an event; what goes wrong is {"error": one sentence} with a fitting status. No
path of a request ever names a file.
"""

import asyncio
import contextlib
import functools
import json
import logging
import os
import socket
import sys
import webbrowser
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from um3.core.errors import Terminated, UserError
from um3.core.images import ImageError
from um3.inference.sampling_params import Sampling
from um3.web import model_calls as work
from um3.web.address import is_loopback
from um3.web.security import Guard
from um3.web.worker import Busy, Job, Worker

if TYPE_CHECKING:
    from um3.inference.pipeline import UM3Pipeline

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page.html")
MAX_UPLOAD = 20 * 2**20
MAX_REQUEST = 256 * 2**10
UPLOAD_S = 60.0
"""Seconds in which a request has to have arrived."""
CLOSE = {"Connection": "close"}
"""Of an answer to a request that is not read to its end: without it the rest would be waited for."""
POLL_S = 0.2
MAX_CONNECTIONS = 128
STATUS_OF_IMAGE = {"too large": 413, "not an image": 415}


class Site:
    """The handlers, over one pipeline and its worker."""

    def __init__(self, pipeline: "UM3Pipeline", *, sampling: dict[str, Any], most_waiting: int, page: str):
        self.pipeline, self.sampling, self.page = pipeline, sampling, page
        self.worker = Worker(most_waiting=most_waiting)

    async def show_page(self, request: Request) -> Response:
        """GET /"""
        return HTMLResponse(self.page)

    async def model(self, request: Request) -> Response:
        """GET /api/model"""
        return JSONResponse(work.facts(self.pipeline) | {"sampling": self.sampling, "max_upload": MAX_UPLOAD})

    async def draw(self, request: Request) -> Response:
        """POST /api/draw with the JSON of a `work.Drawing`."""
        content = await read_body(request, most=MAX_REQUEST)
        asked = work.Drawing.from_json(content, sampling=self.sampling)
        return await self.answer(request, functools.partial(work.draw, pipeline=self.pipeline, asked=asked))

    async def look(self, request: Request) -> Response:
        """POST /api/look with the bytes of an image file."""
        content = await read_body(request, most=MAX_UPLOAD)
        return await self.answer(request, functools.partial(work.look, pipeline=self.pipeline, content=content))

    async def answer(self, request: Request, task: Callable[[Job], None]) -> Response:
        """Wait for the first event, which decides on the status; the others follow as they come."""
        job = self.worker.submit(task)
        events = job.events()
        waiting = asyncio.ensure_future(anext(events))
        try:
            while not (await asyncio.wait([waiting], timeout=POLL_S))[0]:
                if await request.is_disconnected():
                    raise ClientDisconnect
            first = waiting.result()
        except BaseException:
            waiting.cancel()
            self.worker.leave(job)
            raise
        return Lines(_lines(first, events), leave=functools.partial(self.worker.leave, job))


class Lines(StreamingResponse):
    """JSON lines that say so when they are not wanted any longer, or when they are all sent."""

    def __init__(self, content: AsyncIterator[str], *, leave: Callable[[], None]):
        super().__init__(content, media_type="application/x-ndjson")
        self.leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them (ASGI)."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()


async def _lines(first: dict[str, Any], events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    yield json.dumps(first) + "\n"
    try:
        async for event in events:
            yield json.dumps(event) + "\n"
    except Exception as error:  # the status is long sent: this line has to tell it
        if not isinstance(error, UserError):
            logger.exception("the model failed")
        yield json.dumps({"event": "error", "error": _sentence(error)}) + "\n"


async def read_body(request: Request, *, most: int) -> bytes:
    """The body of a request, refused as soon as it is known to be too long.

    Raises:
        HTTPException: more than `most` bytes, or not all of them in UPLOAD_S.
    """
    too_long = HTTPException(413, f"more than {most:,} bytes are not taken; send less", headers=CLOSE)
    if int(request.headers.get("content-length", 0)) > most:
        raise too_long
    content = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_S):
            async for chunk in request.stream():
                content += chunk
                if len(content) > most:
                    raise too_long
    except TimeoutError:
        raise HTTPException(408, f"the request did not arrive within {UPLOAD_S:g} seconds", headers=CLOSE) from None
    return bytes(content)


def _sentence(error: Exception) -> str:
    match error:
        case UserError():
            return str(error)
        case ImageError():
            return f"{error}; give a PNG, JPEG, WEBP, GIF, BMP or TIFF file"
        case Busy():
            return "too many requests wait already; try again in a moment"
        case HTTPException():
            return error.detail
    return "the server made a mistake; its own output says which"


async def _refuse(request: Request, error: Exception) -> Response:
    headers = {}
    match error:
        case UserError():
            status = 400
        case ImageError():
            status = STATUS_OF_IMAGE.get(error.reason, 422)
        case Busy():
            status, headers = 503, {"Retry-After": "2"}
        case HTTPException():
            status, headers = error.status_code, dict(error.headers or {})
        case ClientDisconnect():
            status = 499  # nobody reads it
        case _:
            status = 500
    return JSONResponse({"error": _sentence(error)}, status_code=status, headers=headers)


def build_app(
    pipeline: "UM3Pipeline", *, sampling: dict[str, Any], most_waiting: int, open_to_others: bool = False
) -> ASGIApp:
    """The ASGI application; `sampling` are the settings of requests that name none.

    Raises:
        UserError: one of these settings is out of its range.
    """
    Sampling(**sampling)
    page = PAGE.read_text(encoding="utf-8")
    site = Site(pipeline, sampling=sampling, most_waiting=most_waiting, page=page)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await site.worker.close()

    app = Starlette(
        routes=[
            Route("/", site.show_page),
            Route("/api/model", site.model),
            Route("/api/draw", site.draw, methods=["POST"]),
            Route("/api/look", site.look, methods=["POST"]),
        ],
        exception_handlers=dict.fromkeys(
            (UserError, ImageError, Busy, HTTPException, ClientDisconnect, Exception), _refuse
        ),
        lifespan=lifespan,
    )
    return Guard(app, page=page, open_to_others=open_to_others)


def _has_display() -> bool:
    """Without one Python would open a browser for terminals in this very terminal, and wait for its end."""
    return sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


def run(
    pipeline: "UM3Pipeline", *, listener: socket.socket, sampling: dict[str, Any], most_waiting: int, opens: bool
) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    host, port = listener.getsockname()[:2]
    app = build_app(pipeline, sampling=sampling, most_waiting=most_waiting, open_to_others=not is_loopback(host))
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"UM3 is at {url} (Ctrl-C stops it)", flush=True)
    if opens and _has_display():
        webbrowser.open(url)  # the listener holds its request until the server runs
    with contextlib.suppress(KeyboardInterrupt, Terminated):
        uvicorn.Server(config).run(sockets=[listener])
