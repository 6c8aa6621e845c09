"""Limits for connections that send no request or read no answer, for which uvicorn alone would wait without end."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS, MAX_PER_ADDRESS = 128, 64
HEAD_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 60.0
"""For the head of a request, and for the client to read what is sent; `um3.web.server` limits the body's time."""


class LimitedConnection(H11Protocol):
    """An HTTP/1.1 connection that ends when its client takes too long.

    When an address has more than MAX_PER_ADDRESS connections, or all together are more than MAX_CONNECTIONS, the oldest
    one there that has not sent a whole request ends: a new one gets through, however many are silent.
    """

    address, opened_s, limit_s = "", 0.0, 0.0
    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.opened_s, self.address = self.loop.time(), self.client[0] if self.client else ""
        self._watch()
        connections: list[Any] = [other for other in self.connections if not other.transport.is_closing()]
        neighbours = [other for other in connections if other.address == self.address]
        if len(neighbours) > MAX_PER_ADDRESS or len(connections) > MAX_CONNECTIONS:
            crowd = neighbours if len(neighbours) > MAX_PER_ADDRESS else connections
            waiting = [other for other in crowd if not other.has_whole_request()]
            min(waiting, key=lambda other: other.opened_s).transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.deadline is not None:
            self.deadline.cancel()

    def has_whole_request(self) -> bool:
        """Whether the server is answering a request that has arrived to its end."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _watch(self) -> None:
        """Begin a time limit, or end it; a part of a request or of an answer does not extend it."""
        awaits_head = self.cycle is None or self.cycle.response_complete
        limit_s = READ_TIMEOUT_S if self.flow.write_paused else HEAD_TIMEOUT_S if awaits_head else 0.0
        if limit_s != self.limit_s:
            if self.deadline is not None:
                self.deadline.cancel()
            self.limit_s = limit_s
            self.deadline = self.loop.call_later(limit_s, self.transport.abort) if limit_s else None
