"""API keys of the gateway: which app a key stands for, in a file that has no key in it.

A key is 32 random bytes, so its SHA-256 gives nothing away, and there is nothing that a slow hash
would slow down.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pagedd._errors import PageddError
from pagedd._paths import config_file

PREFIX = "pagedd-"
"""What every key begins with: others are what clients make up because they have to send one."""

PRIORITIES = ("interactive", "normal", "background")


@dataclass(frozen=True, slots=True)
class Key:
    """What is kept of a key."""

    id: str
    """Names it for `revoke`: the beginning of its hash."""
    app: str
    priority: str
    added: str
    """Date, by UTC."""
    sha256: str


class KeyFileError(PageddError):
    """The file cannot be used as it is."""

    code = "E_KEYS"


def keys_file() -> Path:
    """``keys.json`` beside the configuration file."""
    return config_file().with_name("keys.json")


def add(path: Path, app: str, priority: str) -> tuple[str, Key]:
    """Make a key for an app; it is told here and nowhere else.

    Raises:
        KeyFileError: The file is not as it was written.
        OSError: It cannot be written.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    digest = _digest(secret)
    added = time.strftime("%Y-%m-%d", time.gmtime())
    key = Key(digest[:8], app, priority, added, digest)
    with _changing(path) as keys:
        keys.append(key)
    return secret, key


def revoke(path: Path, which: str) -> list[Key]:
    """Take away the key of this id, or all keys of this app; those that were taken.

    Raises:
        KeyFileError: The file is not as it was written.
        OSError: It cannot be written.
    """
    with _changing(path) as keys:
        gone = [key for key in keys if which in (key.id, key.app)]
        keys[:] = [key for key in keys if key not in gone]
    return gone


def read(path: Path) -> list[Key]:
    """All keys; none if there is no file.

    Raises:
        KeyFileError: Others may read or write it, or it is not as it was written.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise KeyFileError(f"others than its owner may use {path}: chmod 600 it")
            document: Any = json.loads(file.read())
        return [Key(**entry) for entry in document["keys"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise KeyFileError(f"{path} cannot be read: {error}") from error


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[list[Key]]:
    """The keys, written back at the end: whole or not at all, one writer at a time."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = read(path)
        yield keys
        new = path.with_suffix(".new")
        new.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(new, flags, 0o600), "w") as file:
            json.dump({"keys": [asdict(key) for key in keys]}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


class KeyRing:
    """The keys of a file, read again whenever it has changed: no gateway outlives a revoked key."""

    def __init__(self, path: Path, complain: Callable[[KeyFileError], None]) -> None:
        """``complain`` is told once of a file that cannot be used; then no key is good."""
        self._path = path
        self._complain = complain
        self._seen: object = None
        self._keys: dict[str, Key] = {}

    def find(self, secret: str) -> Key | None:
        """What a client sent as its key; None if it is none, or none any more."""
        self._refresh()
        return self._keys.get(_digest(secret))

    def __len__(self) -> int:
        self._refresh()
        return len(self._keys)

    def _refresh(self) -> None:
        try:
            found = self._path.stat()
            seen: object = (found.st_mtime_ns, found.st_ino, found.st_size, found.st_mode)
        except OSError:
            seen = None
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._keys = {key.sha256: key for key in read(self._path)}
        except KeyFileError as error:
            self._keys = {}
            self._complain(error)
