"""What users of the prefix store have cleared: how often, each.

Whoever clears begins a new era: other names for all pages (`pagedd_daemon.front.apps`), and what is
of an earlier one is erased when an engine next opens the store. So nothing from before is found
from the moment of the answer on, whatever an engine is doing, and a daemon that is killed forgets
nothing.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from pagedd_daemon.owners import MOST_ERAS
from pagedd_daemon.private_files import NotPrivateError, open_private

_LINE = re.compile(r"(\d{1,10}) (\d{1,10})")


class Eras:
    """The eras of all users, in a file beside the store: ``uid era`` for each who has cleared."""

    def __init__(self, path: Path | None = None) -> None:
        """Those in the file; without ``path`` there is no store.

        Raises:
            NotPrivateError: As `open_private`, or the file holds something else.
            OSError: It cannot be read.
        """
        self._path = path
        self._of: dict[int, int] = {} if path is None else _read(path)

    @property
    def kept(self) -> bool:
        """Whether there is a store that anything could be cleared from."""
        return self._path is not None

    def of(self, uid: int) -> int:
        """The user's era, 0 at first."""
        return self._of.get(uid, 0)

    def all(self) -> list[tuple[int, int]]:
        """Users who have cleared, and their eras."""
        return list(self._of.items())

    def next(self, uid: int) -> None:
        """The user clears what was stored so far. Writes a file: not for the event loop.

        Raises:
            OSError: It cannot be written, and nothing has changed.
        """
        assert self._path is not None
        assert self.of(uid) < MOST_ERAS
        eras = {**self._of, uid: self.of(uid) + 1}
        _write(self._path, "".join(f"{user} {era}\n" for user, era in eras.items()))
        self._of = eras


def _read(path: Path) -> dict[int, int]:
    try:
        descriptor = open_private(path, create=False)
    except FileNotFoundError:
        return {}
    with os.fdopen(descriptor, encoding="ascii", errors="replace") as file:
        lines = [_LINE.fullmatch(line) for line in file.read().splitlines()]
    if None in lines:
        raise NotPrivateError(f"{path} holds something else than eras of users")
    return {int(line[1]): int(line[2]) for line in lines if line is not None}


def _write(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".eras-")  # 0600
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
