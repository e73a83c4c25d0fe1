"""The socket directory: who may serve in it, its listening sockets, and how many clients fit.

libzmq neither asks before it unlinks what lies at an ``ipc://`` path, nor survives `accept` running
out of descriptors (it aborts the process), and a listening socket cannot be taken back from it:
unbinding it ends every connection that came over it. So libzmq never gets the socket that clients
find at the path. When some have connected, a new listening socket takes its place there, and the
old one, which nobody can reach any more, is handed over: libzmq accepts those in its queue, whose
length we chose, and no others. While there is no room for so many, they wait in the kernel.

A socket that the service manager made is our first one, and still the manager's when we end: it is
put back at its path then, under a second name of its file until then.

(A client that blocks in `connect` because a queue is full looks the path up again when it wakes:
unix_stream_connect in net/unix/af_unix.c.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import socket
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pagedd_daemon.front.access import Access

LOCK_NAME = "pagedd.lock"
DATA_NAME = "pagedd.sock"
CONTROL_NAME = "control.sock"

_MAX_PATH_BYTES = 107
"""``sun_path`` of unix(7) has 108 bytes, one of them the terminating zero."""


class AlreadyRunning(Exception):  # noqa: N818
    """Another daemon serves in this directory.

    Attributes:
        pid: Of the other daemon; 0 if it has not written it yet.
        path: The lock file it holds.
        started: When it started, ISO 8601; ``""`` if unknown.
    """

    def __init__(self, pid: int, path: Path, started: str = "") -> None:
        since = f", running since {started}" if started else ""
        super().__init__(f"another daemon (process {pid}{since}) holds {path}")
        self.pid = pid
        self.path = path
        self.started = started


class SocketPathError(Exception):
    """The directory, or what lies at a socket's path, cannot be used; it is left as it is.

    Attributes:
        path: What is in the way.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


class SocketDirectory:
    """The directory, held by a lock for as long as this object is open."""

    def __init__(
        self,
        path: Path,
        inherited: Mapping[str, socket.socket] | None = None,
        access: Access | None = None,
    ) -> None:
        """Takes the directory, which is created if need be.

        Args:
            path: The directory.
            inherited: Sockets that listen there already, made by the service manager.
            access: Who may enter it; None: we alone.

        Raises:
            AlreadyRunning: Another daemon holds it.
            SocketPathError: It is not a directory of ours that is closed to everybody else.
        """
        self.path = path
        self._access = access or Access()
        self._ours: dict[str, tuple[int, int]] = {}
        """Name -> device and inode of the socket we have there."""
        self._made = 0
        self._inherited = dict(inherited or {})
        """Those that were not asked for yet."""
        self._managed: set[str] = set()
        """Names whose first socket is the service manager's."""
        _check_directory(path, self._access)
        self._lock_fd = _lock(path / LOCK_NAME)

    def listen(self, name: str, backlog: int) -> socket.socket:
        """A listening socket ``name`` in place of a stale one or of our own last one; of mode 0600,
        or where the daemon is shared 0660 or 0666.

        Who has connected to our last one stays connected, or in its queue. The caller owns it.

        Raises:
            SocketPathError: Something that is not our socket lies there. It is kept.
        """
        path = self.path / name
        if name in self._inherited:
            return self._take_over(name, backlog)
        if len(os.fsencode(path)) > _MAX_PATH_BYTES:
            raise SocketPathError(
                path, f"the path of a Unix socket has at most {_MAX_PATH_BYTES} bytes"
            )
        if self._identity(path) is None or self._identity(path) != self._ours.get(name):
            _remove_stale(path)
        # Made under a name of its own, by which libzmq tells it from the one it replaces. No longer
        # than the real one.
        self._made += 1
        temporary = self.path / f".{self._made}"
        _remove_stale(temporary)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # The mode at bind is what counts: a chmod afterwards would leave a moment to connect.
            before = os.umask(0o177)
            try:
                sock.bind(os.fspath(temporary))
            finally:
                os.umask(before)
            sock.listen(backlog)
            self._open_to_others(temporary)
            # libzmq accepts until it would block, and gets this very file description.
            sock.setblocking(False)
            os.rename(temporary, path)
        except OSError as error:
            sock.close()
            temporary.unlink(missing_ok=True)
            raise SocketPathError(path, error.strerror or str(error)) from error
        identity = self._identity(path)
        assert identity is not None
        self._ours[name] = identity
        return sock

    def _take_over(self, name: str, backlog: int) -> socket.socket:
        """The manager's socket, with a queue of the length we count on.

        Its file keeps a second name, under which the manager's socket can be put back.
        """
        sock = self._inherited.pop(name)
        path, kept = self.path / name, self.path / _kept(name)
        try:
            sock.listen(backlog)
            if kept.is_socket():
                # A daemon before us ended without putting it back.
                os.replace(kept, path)
            self._check_manager(path)
            os.link(path, kept)
        except OSError as error:
            sock.close()
            raise SocketPathError(path, error.strerror or str(error)) from error
        self._managed.add(name)
        identity = self._identity(path)
        assert identity is not None
        self._ours[name] = identity
        return sock

    def _open_to_others(self, path: Path) -> None:
        """Lets those connect whom we serve: opened after it was made, so never too wide."""
        if not self._access.shared:
            return
        if self._access.group is not None:
            os.chown(path, -1, self._access.group)
        os.chmod(path, 0o666 if self._access.group is None else 0o660)

    def _check_manager(self, path: Path) -> None:
        """Whoever may connect to the manager's socket is who is to be served."""
        group, found = self._access.group, os.stat(path)
        if group is not None and (found.st_gid != group or found.st_mode & 0o002):
            raise SocketPathError(
                path,
                f"is open to others than group {group}; give the socket unit SocketGroup= and "
                "SocketMode=0660",
            )

    def close(self) -> None:
        """Removes our sockets, puts the service manager's back, and gives the directory up.

        The lock file stays: removing one races with the next daemon that opens it.
        """
        if self._lock_fd < 0:
            return
        for sock in self._inherited.values():
            sock.close()
        for name, identity in self._ours.items():
            if name in self._managed:
                with contextlib.suppress(FileNotFoundError):
                    # (Where both names are one file, rename leaves both.)
                    os.replace(self.path / _kept(name), self.path / name)
                    os.unlink(self.path / _kept(name))
            elif self._identity(self.path / name) == identity:
                os.unlink(self.path / name)
        self._ours.clear()
        os.ftruncate(self._lock_fd, 0)
        os.close(self._lock_fd)
        self._lock_fd = -1

    @staticmethod
    def _identity(path: Path) -> tuple[int, int] | None:
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino


def _kept(name: str) -> str:
    return f".{name}.manager"


def _check_directory(path: Path, access: Access) -> None:
    """Creates the directory or checks that it is ours, and open to those whom we serve alone."""
    try:
        fresh = not path.exists()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise SocketPathError(path, "is a symbolic link") from error
        raise SocketPathError(path, error.strerror or str(error)) from error
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            raise SocketPathError(path, f"belongs to user {found.st_uid}, not to us")
        if fresh and access.shared:
            if access.group is not None:
                os.fchown(fd, -1, access.group)
            os.fchmod(fd, 0o711 if access.group is None else 0o710)
            found = os.fstat(fd)
    except OSError as error:
        raise SocketPathError(path, error.strerror or str(error)) from error
    finally:
        os.close(fd)
    mode = stat.S_IMODE(found.st_mode)
    if wrong := directory_trouble(mode, found.st_gid, access):
        reason, advice = wrong
        raise SocketPathError(path, f"{reason} (mode {mode:04o}); run: {advice} {path}")


def directory_trouble(mode: int, gid: int, access: Access) -> tuple[str, str] | None:
    """What is wrong with the mode and group of a socket directory, and the command that mends it
    but for the path; None if nothing is."""
    if not access.shared:
        return ("is open to others", "chmod 700") if mode & 0o077 else None
    if access.group is None:
        if mode & 0o022:
            return "can be written by others", "chmod 711"
        return None if mode & 0o001 else ("cannot be entered by others", "chmod 711")
    if gid != access.group:
        return f"belongs to group {gid} and not to {access.group}", f"chgrp {access.group}"
    if mode & 0o027:
        return f"is open to others than group {gid}", "chmod 710"
    return None if mode & 0o010 else (f"cannot be entered by group {gid}", "chmod 710")


def _lock(path: Path) -> int:
    """A descriptor that holds the lock file, in which our pid and start now stand."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        raise SocketPathError(path, error.strerror or str(error)) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = dict(
            line.split("=", 1)
            for line in os.pread(fd, 4096, 0).decode("ascii", "replace").splitlines()
            if "=" in line
        )
        os.close(fd)
        pid = holder.get("pid", "")
        raise AlreadyRunning(
            int(pid) if pid.isdecimal() else 0, path, holder.get("started", "")
        ) from None
    except OSError as error:
        os.close(fd)
        raise SocketPathError(path, error.strerror or str(error)) from error
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"pid={os.getpid()}\nstarted={started}\n".encode(), 0)
    return fd


def _remove_stale(path: Path) -> None:
    """Removes a socket of ours nobody listens on; anything else that lies there is refused."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise SocketPathError(path, "is not a socket; it is left as it is")
    if found.st_uid != os.geteuid():
        raise SocketPathError(path, f"is a socket of user {found.st_uid}; it is left as it is")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:
            # EAGAIN: somebody listens, and has a full queue.
            pass
    raise SocketPathError(
        path,
        "is the socket of another program that listens on it; if that is the service manager, the "
        "first request starts the daemon (see 'pagedd service status')",
    )


# ------------------------------------------------------------------------------------- descriptors


def raise_descriptor_limit(wanted: int) -> int:
    """Raises the soft limit of open files towards ``wanted``; what it is then.

    The usual soft limit of 1,024 is for programs that use `select`; it could not hold the
    connections the daemon allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if most > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return soft


def open_descriptors() -> int:
    """Descriptors this process has open."""
    return len(os.listdir("/proc/self/fd")) - 1


@dataclass(frozen=True, slots=True)
class DescriptorGuard:
    """Keeps half of the descriptors for everything but clients."""

    limit: int

    @property
    def backlog(self) -> int:
        """For `listen`: how many clients may wait, hence come in at once."""
        return max(4, min(64, self.limit // 16))

    @property
    def batch(self) -> int:
        """Descriptors that handing over one listening socket may take: Linux queues one more than
        the backlog, and another listening socket takes its place."""
        return self.backlog + 2

    def has_room(self, open_now: int, unsettled: int) -> bool:
        """Whether one more listening socket may be handed over.

        Args:
            open_now: Descriptors that are open.
            unsettled: Listening sockets handed over before from which clients may still come.
        """
        return open_now + (unsettled + 1) * self.batch <= self.limit // 2
