"""Files that are one person's alone: keys, and keys and values."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

SECRET_BYTES = 32
STORE_NAME, KEY_NAME, ERAS_NAME = "prefixes.kv", "prefixes.key", "prefixes.eras"
"""The store of prefixes that outlives the daemon, the key that its page names come from, and how
often users have cleared what was theirs in it."""


class NotPrivateError(OSError):
    """A file or folder is not what it must be, so it is not touched."""


def private_folder(folder: Path) -> None:
    """Make the folder, 0700, or check that nobody else can change what is in it.

    Raises:
        NotPrivateError: It is another's, or others can write to it.
        OSError: It cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise NotPrivateError(
            f"{folder} belongs to user {found.st_uid} with mode {found.st_mode & 0o777:o}: "
            "others could put files there"
        )


def open_private(path: Path, *, create: bool = True) -> int:
    """Open a regular file of one's own that nobody else may read, 0600; made if it is missing.

    Returns:
        A descriptor for reading and writing, close-on-exec.

    Raises:
        NotPrivateError: A link, FIFO, device or folder; another's; or others may read or write it.
        OSError: It cannot be opened.
    """
    # Not blocking: opening a FIFO would wait for its other end.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags | (os.O_CREAT if create else 0), 0o600)
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise NotPrivateError(f"{path} is no regular file") from error
        raise
    found = os.fstat(descriptor)
    wrong = ""
    if not stat.S_ISREG(found.st_mode):
        wrong = "is no regular file"
    elif found.st_uid != os.geteuid():
        wrong = f"belongs to user {found.st_uid}"
    elif found.st_mode & 0o077:
        wrong = f"has mode {found.st_mode & 0o777:o}, and must have 600"
    elif found.st_nlink != 1:
        wrong = f"has {found.st_nlink} names"
    if wrong:
        os.close(descriptor)
        raise NotPrivateError(f"{path} {wrong}")
    return descriptor


def secret(path: Path) -> bytes:
    """The 32 random bytes in a private file, made once.

    Raises:
        NotPrivateError: As `open_private`, or the file holds something else.
        OSError: It cannot be read or made.
    """
    private_folder(path.parent)
    descriptor = open_private(path)
    try:
        found = os.read(descriptor, SECRET_BYTES + 1)
        if not found:
            found = secrets.token_bytes(SECRET_BYTES)
            os.write(descriptor, found)
            os.fsync(descriptor)
        if len(found) != SECRET_BYTES:
            raise NotPrivateError(f"{path} holds {len(found)} bytes, and no key of {SECRET_BYTES}")
        return found
    finally:
        os.close(descriptor)
