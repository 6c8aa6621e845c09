"""Where the server listens. Apart from it, so that a port in use is said before torch and a model are loaded."""

import errno
import ipaddress
import socket

from um3.core.errors import UserError


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UserError: the port is taken or not ours to use, or the host is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        remedy = "pass --port with another, or 0 for a free one"
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            remedy = "pass --host with an address of this machine"
        reason = str(error.strerror).partition(" (while")[0]
        raise UserError(f"cannot listen on {host} port {port} ({reason}); {remedy}") from None
