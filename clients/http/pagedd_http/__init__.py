"""The HTTP gateway: other people's interfaces over the daemon's own protocol.

It is a client of the daemon like any other, in a process of its own: the daemon has no network
code. `create_app` makes the ASGI application, ``pagedd gateway`` serves it.
"""

from __future__ import annotations

from pagedd_http.app import create_app
from pagedd_http.settings import App, Settings

__all__ = ["App", "Settings", "create_app"]
