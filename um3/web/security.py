"""Where the server listens, who may call it, and what the page may load. Importing this loads no torch.

A page of another site can make a browser send requests to this server, and with DNS rebinding even under that site's
own name. Both are refused. A server that other machines can reach answers only requests that hold its token. The
content policy lets the page load nothing but this server's own files.
"""

import errno
import ipaddress
import logging
import re
import secrets
import socket
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from um3.core.errors import UserError
from um3.core.files import short_hash

logger = logging.getLogger(__name__)

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. UserError if the port is taken, or the host is another machine."""
    if not host:
        raise UserError("the host is empty, which means every address of this machine; pass --host 0.0.0.0 for those")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        remedy = "pass another --port, or --port 0 for a free one"
        if (error.errno or 0) < 0 or error.errno == errno.EADDRNOTAVAIL:  # below 0: the name cannot be resolved
            remedy = "pass an address of this machine as --host"
        reason = str(error.strerror).partition(" (while")[0]
        raise UserError(f"cannot listen on {host} port {port} ({reason}); {remedy}") from None


def check_host_names(names: Sequence[str]) -> list[str]:
    """The names in lower case; UserError for one that is no bare host name."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", name):
            raise UserError(f"--allow-host {name!r} is not a host name; give the name alone, such as gpu.example.org")
    return [name.lower() for name in names]


class RequestGuard:
    """ASGI middleware: refuses foreign requests, adds the security headers, logs a line per request.

    The server may be called as localhost and by the names of `allow_hosts`, and if it is `open_to_others` by any IP
    address. With a `token`, a request must hold it as a cookie or as `Authorization: Bearer TOKEN`; GET /?token=TOKEN
    sets the cookie, and leads to the page without the token in its address.
    """

    def __init__(self, app: ASGIApp, *, open_to_others: bool = False, allow_hosts: Sequence[str] = (), token: str = ""):
        self.app, self.open_to_others, self.token = app, open_to_others, token
        self.allow_hosts = check_host_names(allow_hosts)
        self.cookie = f"um3-{short_hash(token)}"  # cookies ignore ports: each server of a machine has its own name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.monotonic()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                seconds = time.monotonic() - start
                logger.info("%s %s -> %d after %.2f s", scope["method"], scope["path"][:80], message["status"], seconds)
            await send(message)

        headers = Headers(scope=scope)
        app = self.app
        if refusal := self.refusal(headers, method=scope["method"]):
            app = JSONResponse({"error": refusal}, status_code=403)
        elif self.token and not self.has_token(headers):
            app = self._without_token(scope)
        await app(scope, receive, send_with_headers)

    def refusal(self, headers: Headers, *, method: str) -> str:
        """The reason to refuse a request that is not from this server's page; empty for a request to answer."""
        host = headers.get("host", "")
        try:  # an address, by which no other server can be meant, or an allowed name
            name = urlsplit(f"//{host}").hostname or ""
            is_own = is_loopback(name) or name in self.allow_hosts
            is_own = is_own or (self.open_to_others and bool(ipaddress.ip_address(name)))
        except ValueError:
            is_own = False
        if not is_own:
            return f"this server does not answer to the host name '{host[:80]}'; use its address, or allow the name"
        if headers.get("origin", f"http://{host}") not in (f"http://{host}", f"https://{host}"):
            return "the request comes from a page of another site"
        if method != "GET" and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "the request comes from a page of another site"
        return ""

    def has_token(self, headers: Headers) -> bool:
        """Whether the request holds the token."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        cookie = cookie_parser(headers.get("cookie", "")).get(self.cookie, "")
        return self._is_token(cookie) or (scheme.lower() == "bearer" and self._is_token(bearer.strip()))

    def _is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.encode(), self.token.encode())

    def _without_token(self, scope: Scope) -> Response:
        is_page = (scope["method"], scope["path"]) == ("GET", "/")
        if is_page and self._is_token(QueryParams(scope["query_string"]).get("token", "")):
            response = RedirectResponse("/", status_code=303)
            # Lax: the browser also sends it after a click on the address in a mail or a chat.
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="lax")
            return response
        message = "this request lacks the server's token; open the address that um3 serve printed"
        return JSONResponse({"error": message}, status_code=401, headers={"WWW-Authenticate": "Bearer"})
