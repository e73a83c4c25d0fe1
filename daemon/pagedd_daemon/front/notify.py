"""What the daemon tells the service manager: sd_notify(3) in a few lines of datagrams.

Without a service manager everything here does nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

_MOST_S = 86400.0


class Notifier:
    """Speaks to the manager that started this process, if one did and wants to hear."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Takes what concerns this process out of the environment: children are not meant."""
        address = environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        interval, of = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        mine = of in ("", str(os.getpid())) and interval.isdecimal()
        self.watchdog_s: float | None = int(interval) / 1e6 if mine else None
        """Seconds within which `watchdog` must be called again and again; None: nobody waits."""

    @property
    def heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self._address)

    def ready(self, status: str) -> None:
        """A request would be served now; also ends `reloading`."""
        self._send("READY=1", f"STATUS={status}")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._send(f"STATUS={text}")

    def reloading(self) -> None:
        """Settings are being read again; `ready` must follow."""
        # The clock is the one that systemd compares with: CLOCK_MONOTONIC, in microseconds.
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}")

    def stopping(self, status: str) -> None:
        """The end has begun."""
        self._send("STOPPING=1", f"STATUS={status}")

    def more_time(self, seconds: float) -> None:
        """Starting or stopping may take so long from now on."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(min(seconds, _MOST_S) * 1e6)}")

    def watchdog(self) -> None:
        """Work makes progress, or there is none."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        text = "\n".join(" ".join(line.splitlines()) for line in lines)
        with (
            contextlib.suppress(OSError),  # a manager that is gone must not end the daemon
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.setblocking(False)
            sock.sendto(text.encode(), self._address)
