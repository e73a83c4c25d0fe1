"""What the kernel knows of the program behind a connection: its control group or its executable.

An app calls itself what it likes, so shares are divided between programs before they are divided
between names. The program is read from ``/proc`` once per connection, in a thread, since the event
loop waits for nobody.

**Another process must not be taken for the peer.** A process id may be that of another process by
the time it is looked up. So the peer is pinned first: Linux 6.5 and later hands out a descriptor of
the very process that connected (``SO_PEERPIDFD``), and what was read counts only if that process
still lives afterwards, which means that the id was its own all along. Before 6.5 the descriptor is
opened by the id when the peer says hello; a process that had ended by then, and whose id was taken
over, is the gap that remains.

This keeps programs apart that mean well, and names from multiplying. It is no wall against a
program of the same user that means harm: that can trace, preload or imitate any other.
"""

from __future__ import annotations

import os
import re
import select
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

_SO_PEERPIDFD = 77
"""asm-generic/socket.h, Linux 6.5; Python has no name for it."""
_MOST_BYTES = 4096
_UNIT = re.compile(r".+\.(?:scope|service)")
_SESSION = re.compile(r"session-.*\.scope|user@.*\.service|init\.scope|.*\.slice")
"""Units that hold a whole login, and say nothing of the program."""


@dataclass(frozen=True, slots=True)
class Program:
    """A peer process, as far as the kernel says."""

    executable: str = ""
    """Path; ``""`` if it cannot be read."""
    scope: str = ""
    """The innermost systemd scope or service that the program was started in, ``""`` for none."""

    @property
    def label(self) -> str:
        """What shares are divided by: the scope where there is one, else the executable. A scope
        also holds the helpers that a program starts."""
        return self.scope or self.executable


UNKNOWN = Program()
"""The process has ended, or must not be looked at."""


def pin(connection_fd: int, pid: int) -> int | None:
    """A pidfd of the process that opened a connection; the caller closes it.

    Args:
        connection_fd: Descriptor of the connection, which stays libzmq's.
        pid: Its process id, from the credentials of the connection.

    Returns:
        None if there is no such process any more, or the kernel has no pidfd.
    """
    try:
        with socket.socket(fileno=os.dup(connection_fd)) as sock:
            pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
            return int.from_bytes(pidfd, sys.byteorder)
    except OSError:
        pass
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def program(pid: int, pidfd: int, proc: Path = Path("/proc")) -> Program:
    """The program of a process that was pinned. Reads files: not for the event loop.

    Args:
        pid: Its id.
        pidfd: A descriptor of it, which tells whether the id was still its own.
        proc: Where the process file system is.
    """
    folder = proc / str(pid)
    try:
        executable = os.readlink(folder / "exe").removesuffix(" (deleted)")
    except OSError:
        executable = ""
    try:
        with (folder / "cgroup").open("rb") as file:
            scope = scope_of(file.read(_MOST_BYTES).decode("utf-8", "replace"))
    except OSError:
        scope = ""
    if _ended(pidfd):
        return UNKNOWN
    return Program(executable, scope)


def _ended(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def scope_of(cgroup: str) -> str:
    """The innermost unit of ``/proc/PID/cgroup`` that was made for a program (cgroups(7): lines of
    ``hierarchy:controllers:path``; systemd's own has no controllers, or is ``name=systemd``).
    """
    for line in cgroup.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers not in ("", "name=systemd"):
            continue
        for part in reversed(path.split("/")):
            if _UNIT.fullmatch(part) and not _SESSION.fullmatch(part):
                return part
    return ""
