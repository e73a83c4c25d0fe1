"""What routes have of the gateway."""

from __future__ import annotations

from starlette.requests import Request

from pagedd import AsyncClient
from pagedd_http.chatting import Forms
from pagedd_http.daemon import Daemon
from pagedd_http.guard import APP
from pagedd_http.pieces import Pieces


class Gateway:
    """Shared by all requests."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.pieces = Pieces()
        self.forms = Forms()


def gateway_of(request: Request) -> Gateway:
    """The gateway that serves this request."""
    gateway = request.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway


async def client_of(request: Request) -> AsyncClient:
    """The daemon's connection of the app that this request is for.

    Raises:
        ConnectionFailed: The daemon is not there, or refuses this user.
        InvalidRequest: The app's name is none the daemon takes.
    """
    return await gateway_of(request).daemon.client(request.scope[APP])
