"""Listening: the sockets of a gateway, and uvicorn on them."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import uvicorn

from pagedd._keys import PREFIX, KeyFileError, KeyRing, keys_file
from pagedd_http.app import create_app
from pagedd_http.peers import PeerProtocol
from pagedd_http.settings import LOOPBACK_NAMES, App, Settings

MAX_CONNECTIONS = 1024
"""Beyond that, clients get 503 at once: each takes a descriptor."""

GRACE_S = 10
"""How long streams may go on after SIGTERM."""


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class ListenError(Exception):
    """The gateway cannot listen there."""

    def __init__(self, message: str, advice: str) -> None:
        super().__init__(message)
        self.advice = advice


def settings(
    *, daemon: str | None, allow_hosts: Sequence[str], key_required: bool = False
) -> Settings:
    """From the command line, with the keys of the person who runs it.

    Raises:
        ListenError: Keys are required, and there is none.
    """
    keys = KeyRing(keys_file(), _complain)

    def app_of(secret: str) -> App | None:
        key = keys.find(secret)
        return None if key is None else App(key.app, key.priority)

    if key_required and not len(keys):
        raise ListenError("there are no API keys", "Make one with 'pagedd apps key add APP'.")
    return Settings(
        daemon=daemon,
        host_names=LOOPBACK_NAMES | {name.lower() for name in allow_hosts},
        key_of=app_of,
        key_prefix=PREFIX,
        key_required=key_required,
    )


def _complain(error: KeyFileError) -> None:
    print(f"pagedd gateway: {error}", file=sys.stderr, flush=True)


def serve(settings: Settings, *, host: str, port: int, uds: Path | None) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit status.

    Raises:
        ListenError: The address is taken, or is not one to listen at.
    """
    names = settings.host_names
    if uds is None and (address := _address(host)) is not None:
        names |= {_shown(address)}
    config = uvicorn.Config(
        create_app(replace(settings, host_names=names)),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        http=PeerProtocol,
        ws="none",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_S,
    )
    listening = _unix(uds) if uds is not None else _tcp(settings, host, port)
    with listening as (sock, name):
        # uvicorn shuts down at these, and then has them do what they did before: the way to end a
        # service is no failure of it.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        print(f"pagedd gateway: listening at {name}", file=sys.stderr, flush=True)
        uvicorn.Server(config).run(sockets=[sock])
    return 0


def _address(host: str) -> _Address | None:
    """What an address says, or None for none; names of other machines are none of ours."""
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
    except ValueError:
        return None


def _shown(address: _Address) -> str:
    """As URLs and ``Host`` have it."""
    return f"[{address}]" if address.version == 6 else str(address)


@contextlib.contextmanager
def _tcp(settings: Settings, host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    address = _address(host)
    if address is None:
        raise ListenError(f"'{host}' is no address", "Use 127.0.0.1 or ::1.")
    if not address.is_loopback and not settings.key_required:
        raise ListenError(
            f"{address} can be reached from other machines, so clients must have API keys",
            "Make one with 'pagedd apps key add APP', and add --require-key.",
        )
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((str(address), port))
        except OSError as error:
            raise ListenError(
                f"cannot listen at {address}, port {port}: {error.strerror}",
                "Choose another --port, or see with 'ss -ltnp' who has it.",
            ) from None
        yield sock, f"http://{_shown(address)}:{sock.getsockname()[1]}"


@contextlib.contextmanager
def _unix(path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A socket that only its owner may connect to."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        _remove_stale(path)
        before = os.umask(0o177)
        try:
            sock.bind(str(path))
        except OSError as error:
            raise ListenError(
                f"cannot listen at {path}: {error.strerror or error}", "Choose another --uds."
            ) from None
        finally:
            os.umask(before)
        inode = path.stat().st_ino
        try:
            yield sock, f"unix://{path}"
        finally:
            with contextlib.suppress(OSError):
                if path.stat().st_ino == inode:
                    path.unlink()


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens at any more; leave anything else.

    Raises:
        ListenError: Somebody listens, or it is no socket.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ListenError(f"{path} is no socket", "Choose another --uds.")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise ListenError(f"{path}: {error.strerror}", "Choose another --uds.") from None
    raise ListenError(f"a gateway listens at {path} already", "Stop it, or choose another --uds.")
