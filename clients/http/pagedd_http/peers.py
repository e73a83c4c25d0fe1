"""Who is at the other end of a Unix socket: the kernel's word, where uvicorn has none."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import struct
from pathlib import Path
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pagedd_http.guard import PEER

_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")


class PeerProtocol(HttpToolsProtocol):
    """uvicorn's protocol, whose requests know the program that opened the connection."""

    def connection_made(  # type: ignore[override]
        self, transport: asyncio.Transport
    ) -> None:
        """A client connected."""
        name = program(cast("socket.socket | None", transport.get_extra_info("socket")))
        if name:
            self.app_state = {**self.app_state, PEER: name}
        super().connection_made(transport)


def program(connection: socket.socket | None, proc: Path = Path("/proc")) -> str:
    """The name of the executable that opened a connection, as an app's name.

    It is a name and no proof: a process of the same user can run under any. It keeps apps apart
    that mean well, as the name in the header does.

    Returns:
        ``""`` for a connection that is no Unix socket's, or a process that cannot be looked at.
    """
    if connection is None or connection.family != socket.AF_UNIX:
        return ""
    try:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, _, _ = struct.unpack("3i", credentials)
        path = os.readlink(proc / str(pid) / "exe")
    except (AttributeError, OSError):  # another system, or a process that is gone
        return ""
    name = os.path.basename(path.removesuffix(" (deleted)"))
    return _NO_NAME.sub("-", name)[:64].strip("-")
