"""Where the server listens, who may call it, and what the page may load. Importing this loads no torch.

A page of another site can make a browser send requests to this server, and with DNS rebinding even under that site's
own name. Both are refused. The content policy lets the page load nothing but what it contains.
"""

import base64
import errno
import hashlib
import ipaddress
import logging
import re
import socket
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from um3.core.errors import UserError

logger = logging.getLogger(__name__)

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. UserError if the port is taken, or the host is another machine."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        remedy = "pass another --port, or --port 0 for a free one"
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            remedy = "pass an address of this machine as --host"
        reason = str(error.strerror).partition(" (while")[0]
        raise UserError(f"cannot listen on {host} port {port} ({reason}); {remedy}") from None


class RequestGuard:
    """ASGI middleware: answers foreign requests with 403, adds the security headers, logs a line per request.

    With `open_to_others` the server may be called by any IP address, but by no host name except localhost.
    """

    def __init__(self, app: ASGIApp, *, page: str, open_to_others: bool):
        self.app, self.open_to_others = app, open_to_others
        self.headers = HEADERS | {"Content-Security-Policy": content_policy(page)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.monotonic()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
                seconds = time.monotonic() - start
                logger.info("%s %s -> %d after %.2f s", scope["method"], scope["path"][:80], message["status"], seconds)
            await send(message)

        refusal = self.refusal(Headers(scope=scope), method=scope["method"])
        app = JSONResponse({"error": refusal}, status_code=403) if refusal else self.app
        await app(scope, receive, send_with_headers)

    def refusal(self, headers: Headers, *, method: str) -> str:
        """The reason to refuse a request; empty for a request to answer."""
        host = headers.get("host", "")
        try:  # the host must be an address, by which no other server can be meant
            name = urlsplit(f"//{host}").hostname or ""
            is_own = is_loopback(name) or (self.open_to_others and bool(ipaddress.ip_address(name)))
        except ValueError:
            is_own = False
        if not is_own:
            return f"this server does not answer to the host name '{host[:80]}'; use its address"
        if headers.get("origin", f"http://{host}") != f"http://{host}":
            return "the request comes from a page of another site"
        if method != "GET" and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "the request comes from a page of another site"
        return ""


def content_policy(page: str) -> str:
    """A Content-Security-Policy that allows the page's own script and style and calls to this server, nothing else."""
    sources = []
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        sources.append(f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'")
    return (
        f"default-src 'none'; script-src {sources[0]}; style-src {sources[1]}; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
