"""What a helper process denies itself before it looks at anything."""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import socket
import threading

from pagedd_daemon.helper.protocol import HelperLimits
from pagedd_daemon.privacy import keep_private

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38


def confine(limits: HelperLimits) -> None:
    """Limit this process, and tie its life to its parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the front
    keep_private()
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits.descriptors, limits.descriptors))
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_PDEATHSIG, signal.SIGKILL), (_PR_SET_NO_NEW_PRIVS, 1)):
        # A sandbox may forbid these; the other limits and the lifeline hold without them.
        libc.prctl(option, int(value), 0, 0, 0)


class Budget:
    """The limits of memory and processor time that move as the process works."""

    def __init__(self, limits: HelperLimits) -> None:
        self._limits = limits
        self._cpu_until = 0
        self._served = 0
        self.allow_model(0)

    def allow_model(self, header_bytes: int) -> None:
        """A model with a header of this size is about to be opened."""
        allowance = header_bytes * self._limits.memory_per_header_byte
        self._resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + allowance
        self._set(resource.RLIMIT_AS, _address_space() + self._limits.memory_bytes + allowance)

    def begin(self) -> None:
        """A request begins: renew its processor time."""
        self._served += 1
        usage = resource.getrusage(resource.RUSAGE_SELF)
        until = int(usage.ru_utime + usage.ru_stime) + 1 + self._limits.cpu_s
        if until != self._cpu_until:
            self._cpu_until = until
            self._set(resource.RLIMIT_CPU, until)

    def spent(self) -> bool:
        """Whether the process should be replaced."""
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._resident
        return self._served >= self._limits.requests or grown > self._limits.growth_bytes

    @staticmethod
    def _set(what: int, soft: int) -> None:
        hard = resource.getrlimit(what)[1]
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
        resource.setrlimit(what, (soft, hard))


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def watch_lifeline(link: socket.socket) -> None:
    """End this process, whatever it is doing, when the other end of ``link`` is closed."""

    def watch() -> None:
        poller = select.poll()
        poller.register(link.fileno(), select.POLLRDHUP)  # not woken by data
        poller.poll()
        os._exit(0)

    threading.stack_size(256 * 1024)
    threading.Thread(target=watch, name="lifeline", daemon=True).start()
