"""The web server: the page, a description of the model, and calls that generate and caption images and chat.

The calls answer with JSON lines; the last line holds the result. An error is {"error": one sentence}, with the argument
at fault as "parameter" if it is known: with a fitting status, or as the last line if it occurs after the first one. The
paths are a fixed list: no path of a request names a file.
"""

import asyncio
import contextlib
import functools
import json
import logging
import os
import secrets
import socket
import sys
import time
import webbrowser
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from um3.core.errors import Terminated, UserError
from um3.core.images import ImageError
from um3.core.text import printable
from um3.inference.pipeline import UM3Pipeline
from um3.inference.sampling_params import Sampling
from um3.web import model_calls
from um3.web.connections import LimitedConnection
from um3.web.security import RequestGuard, is_loopback
from um3.web.worker import Event, Job, Worker

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page")
MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript"}
MAX_UPLOAD_BYTES, MAX_REQUEST_BYTES = 20 * 2**20, 256 * 2**10
UPLOAD_TIMEOUT_S, POLL_S = 60.0, 0.2
CLOSE = {"Connection": "close"}
"""For the answer to a request whose body is not read to its end; the server would wait for the rest otherwise."""
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
"""Host to listen on all addresses -> one of them."""
IMAGE_STATUS = {"too large": 413, "not an image": 415}


class Site:
    """The handlers of the server, over one pipeline and its worker."""

    def __init__(self, pipeline: UM3Pipeline, *, sampling: dict[str, Any], max_waiting: int):
        self.pipeline, self.sampling, self.worker = pipeline, sampling, Worker(max_waiting=max_waiting)

    async def model(self, request: Request) -> Response:
        """GET /api/model"""
        model = model_calls.describe_model(self.pipeline)
        return JSONResponse(model | {"sampling": self.sampling, "max_upload": MAX_UPLOAD_BYTES})

    async def generate(self, request: Request) -> Response:
        """POST /api/generate with the JSON of `model_calls.parse_request`"""
        content = await read_body(request, max_bytes=MAX_REQUEST_BYTES)
        parsed = model_calls.parse_request(content, sampling=self.sampling)
        return await self._stream(request, functools.partial(model_calls.generate, request=parsed))

    async def openai_images(self, request: Request) -> Response:
        """POST /v1/images/generations as in OpenAI's API; see `model_calls.parse_openai_request`"""
        content, image_size = await read_body(request, max_bytes=MAX_REQUEST_BYTES), self.pipeline.processor.image_size
        parsed = model_calls.parse_openai_request(content, sampling=self.sampling, image_size=image_size)
        result, _ = await self._first(
            request, functools.partial(model_calls.generate, request=parsed, shows_rows=False)
        )
        images = [{"b64_json": image["url"].partition(",")[2]} for image in result["images"]]
        return JSONResponse({"created": int(time.time()), "data": images})

    async def caption(self, request: Request) -> Response:
        """POST /api/caption with the bytes of an image file"""
        content = await read_body(request, max_bytes=MAX_UPLOAD_BYTES)
        return await self._stream(request, functools.partial(model_calls.caption, content=content))

    async def chat(self, request: Request) -> Response:
        """POST /api/chat with the JSON of `model_calls.parse_chat`"""
        parsed = model_calls.parse_chat(await read_body(request, max_bytes=MAX_REQUEST_BYTES))
        return await self._stream(request, functools.partial(model_calls.chat, request=parsed))

    async def _stream(self, request: Request, call: Callable[..., None]) -> Response:
        """Run a model call and stream its events. The first event, or the error in its place, decides on the status."""
        first, events = await self._first(request, call)
        # The response cancels its iterator, and thereby the job, when the client disconnects.
        return StreamingResponse(_lines(first, events), media_type="application/x-ndjson")

    async def _first(self, request: Request, call: Callable[..., None]) -> tuple[Event, AsyncIterator[Event]]:
        """Run a model call up to its first event; the event, and those that follow."""
        work: Callable[[Job], None] = functools.partial(call, pipeline=self.pipeline)
        events = self.worker.stream(work)
        first = asyncio.ensure_future(anext(events))
        try:
            while not (await asyncio.wait([first], timeout=POLL_S))[0]:
                if await request.is_disconnected():
                    raise ClientDisconnect
        finally:
            first.cancel()  # cancels the job unless the event is here
        return first.result(), events


async def _lines(first: Event, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    yield json.dumps(first) + "\n"
    try:
        async for event in events:
            yield json.dumps(event) + "\n"
    except Exception as error:
        if not isinstance(error, UserError):
            logger.exception("the model failed")
        yield json.dumps(error_body(error)) + "\n"


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """The body of a request; HTTPException as soon as it is known to be too long, or after UPLOAD_TIMEOUT_S."""
    too_long = HTTPException(413, f"the request has more than {max_bytes:,} bytes; send less", headers=CLOSE)
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_long
    content = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT_S):
            async for chunk in request.stream():
                content += chunk
                if len(content) > max_bytes:
                    raise too_long
    except TimeoutError:
        message = f"the request did not arrive within {UPLOAD_TIMEOUT_S:g} seconds"
        raise HTTPException(408, message, headers=CLOSE) from None
    return bytes(content)


def describe_error(error: Exception) -> tuple[int, str]:
    """The HTTP status of an error, and one sentence for the client."""
    match error:
        case UserError():
            return 400, printable(error)
        case ImageError():
            return IMAGE_STATUS.get(error.reason, 422), f"{printable(error)}; {error.remedy}"
        case HTTPException():
            return error.status_code, error.detail
        case ClientDisconnect():
            return 499, "the client has disconnected"
    return 500, "internal error of the server; see its log"


def error_body(error: Exception) -> dict[str, Any]:
    """The JSON of an error."""
    parameter = getattr(error, "parameter", "")
    return {"error": describe_error(error)[1]} | ({"parameter": parameter} if parameter else {})


async def _error_response(request: Request, error: Exception) -> Response:
    status, body = describe_error(error)[0], error_body(error)
    if request.url.path.startswith("/v1/"):
        kind = "invalid_request_error" if status < 500 else "server_error"
        body = {"error": {"message": body["error"], "type": kind, "param": body.get("parameter"), "code": None}}
    return JSONResponse(body, status_code=status, headers=getattr(error, "headers", None))


def _page_routes() -> list[Route]:
    """A route for each file of the page; the page itself is /."""
    routes = [Route("/", HTMLResponse((PAGE / "page.html").read_bytes()), methods=["GET"])]
    for path in sorted(PAGE.iterdir()):
        if media_type := MEDIA_TYPES.get(path.suffix):
            response = Response(path.read_bytes(), media_type=media_type)
            routes.append(Route(f"/{path.name}", response, methods=["GET"]))
    return routes


def build_app(pipeline: UM3Pipeline, *, sampling: dict[str, Any], max_waiting: int, **access: Any) -> ASGIApp:
    """The ASGI application; `sampling` holds the options of requests that set none, `access` goes to `RequestGuard`."""
    Sampling(**sampling)
    site = Site(pipeline, sampling=sampling, max_waiting=max_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await site.worker.close()

    routes = [
        *_page_routes(),
        Route("/api/model", site.model),
        Route("/api/generate", site.generate, methods=["POST"]),
        Route("/api/caption", site.caption, methods=["POST"]),
        Route("/api/chat", site.chat, methods=["POST"]),
        Route("/v1/images/generations", site.openai_images, methods=["POST"]),
    ]
    errors = (UserError, ImageError, HTTPException, ClientDisconnect, Exception)
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(errors, _error_response), lifespan=lifespan)
    return RequestGuard(app, **access)


def run(
    pipeline: UM3Pipeline,
    *,
    listener: socket.socket,
    sampling: dict[str, Any],
    max_waiting: int,
    open_page: bool,
    allow_hosts: Sequence[str] = (),
) -> None:
    """Serve until Ctrl-C or SIGTERM. A server that other machines can reach prints its address with a new token."""
    host, port = listener.getsockname()[:2]
    is_open = not is_loopback(host)
    token = secrets.token_urlsafe() if is_open or allow_hosts else ""
    access = {"open_to_others": is_open, "allow_hosts": allow_hosts, "token": token}
    app = build_app(pipeline, sampling=sampling, max_waiting=max_waiting, **access)
    address = ANY_ADDRESS.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{address}:{port}" + (f"/?token={token}" if token else "")
    print(f"UM3 is at {url} (Ctrl-C stops it)", flush=True)
    if host in ANY_ADDRESS or allow_hosts:
        names = " or ".join(allow_hosts) or "this machine's address"
        print(f"from other machines, replace {address} by {names}", flush=True)
    # Without a display, Python would open a text browser in this terminal and wait for it.
    has_display = sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
    if open_page and has_display:
        webbrowser.open(url)  # the listener holds the request until the server runs
    with contextlib.suppress(KeyboardInterrupt, Terminated):
        make_server(app).run(sockets=[listener])


def make_server(app: ASGIApp) -> uvicorn.Server:
    """A server of the app that no client can block; it trusts no proxy."""
    config = uvicorn.Config(
        app,
        http=LimitedConnection,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        proxy_headers=False,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)
