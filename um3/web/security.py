"""Who may talk to the server, and what the page may do: checked and said for every request, before any handler.

A page of another site can make a browser send requests here, and with DNS rebinding even under that site's own name;
neither passes. The policy lets the page load nothing but what it carries.
"""

import base64
import hashlib
import ipaddress
import logging
import re
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Answers strangers with 403, gives every answer its headers, writes a line per request.

    `open_to_others`: the server listens beyond this machine, and may be called by any address, but by no name except
    localhost.
    """

    def __init__(self, app: ASGIApp, *, page: str, open_to_others: bool):
        self.app, self.open_to_others = app, open_to_others
        self.headers = HEADERS | {"Content-Security-Policy": content_policy(page)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
                seconds = time.monotonic() - began
                logger.info("%s %s -> %d after %.2f s", scope["method"], scope["path"][:80], message["status"], seconds)
            await send(message)

        refusal = self.refusal(Headers(scope=scope), method=scope["method"])
        app = JSONResponse({"error": refusal}, status_code=403) if refusal else self.app
        await app(scope, receive, send_guarded)

    def refusal(self, headers: Headers, *, method: str) -> str:
        """Why a request is not answered; "" if it is."""
        host = headers.get("host", "")
        if not self.is_ours(host):
            return f"this server does not answer to the name '{host[:80]}'; use its address"
        if headers.get("origin", f"http://{host}") != f"http://{host}":
            return "this request comes from the page of another site"
        if method != "GET" and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "this request comes from the page of another site"
        return ""

    def is_ours(self, host: str) -> bool:
        """Whether a Host header is an address or name by which only this server is meant."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name == "localhost" or ipaddress.ip_address(name).is_loopback or self.open_to_others
        except ValueError:
            return False


def content_policy(page: str) -> str:
    """A Content-Security-Policy: the page's own inline script and style, and calls to this server, and nothing else."""
    allowed = {}
    for tag in ("script", "style"):
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        allowed[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
