"""Connections to the daemon: one for each app that is served."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict

from pagedd import AsyncClient, ConnectionFailed, PageddError
from pagedd_http.settings import App, Settings

MAX_CONNECTIONS = 64
"""Apps that are connected at the same time. Beyond that the one unused for longest is closed; a
client chooses its app's name where no keys are asked for, and names are free."""


OPEN_S = 10.0
"""The longest wait for the daemon's answer to a hello; requests may take as long as they take."""


class Daemon:
    """Hands out the connection of an app, made at its first request and again after it was lost.

    A connection is one peer of the daemon, so an app's requests share its limits there, and
    `pagedd ps` shows them under the app's name.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._clients: OrderedDict[App, AsyncClient] = OrderedDict()
        self._opening = asyncio.Lock()

    async def client(self, app: App) -> AsyncClient:
        """A connection that stands, or did just now.

        Raises:
            ConnectionFailed: The daemon is not there, or refuses this user.
            InvalidRequest: The name is none the daemon takes.
        """
        client = self._clients.get(app)
        if client is None or not client.usable:
            async with self._opening:
                client = self._clients.get(app)
                if client is None or not client.usable:
                    client = await self._open(app)
        self._clients.move_to_end(app)
        return client

    async def _open(self, app: App) -> AsyncClient:
        client = AsyncClient(
            app.name, app.priority, host=self._settings.daemon, timeout=self._settings.timeout_s
        )
        try:
            await asyncio.wait_for(client.open(), OPEN_S)
        except asyncio.TimeoutError:
            raise ConnectionFailed(f"the daemon did not answer within {OPEN_S:g} s") from None
        lost = self._clients.pop(app, None)
        self._clients[app] = client
        if lost is not None:
            await lost.close()
        for name, idle in list(self._clients.items()):
            if len(self._clients) <= MAX_CONNECTIONS:
                break
            if not idle.busy:
                del self._clients[name]
                await idle.close()
        return client

    async def loading(self) -> bool:
        """Whether the daemon is loading a model now; False where it does not say."""
        client = next((one for one in self._clients.values() if one.usable), None)
        if client is None:
            return False
        with contextlib.suppress(PageddError):
            return bool((await client.ping())["state"] == "loading")
        return False

    async def close(self) -> None:
        """End all connections; the daemon cancels what still runs on them."""
        clients = list(self._clients.values())
        self._clients.clear()
        for client in clients:
            await client.close()
