"""Getting one file over HTTP so that it is there whole or not at all, however often it breaks off.

What has arrived is kept beside the target as ``.pull-*.part``, with a note of what it is part of.
The next attempt asks for the rest (RFC 9110, section 14), and begins anew where that would be
another file's. The target appears by one rename, after its size and its SHA-256 were checked.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any

from pagedd._version import __version__
from pagedd.cli import _output as out
from pagedd.cli._app import (
    EX_DATAERR,
    EX_IOERR,
    EX_NOINPUT,
    EX_NOPERM,
    EX_TEMPFAIL,
    CommandError,
)

_PIECE_BYTES = 2**20
_TIMEOUT_S = 30.0
_PAUSES_S = (0.2, 1.0, 3.0)
"""Between attempts that bring nothing new. One that brings something begins the count again."""
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class Remote:
    """A file to get."""

    url: str
    size: int | None = None
    """Bytes, if known beforehand."""
    sha256: str | None = None
    """In hex, if known beforehand."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """To send to this host, and to no other it refers to."""


Report = Callable[[int, int | None], None]
"""Told the bytes that are here, and of how many, as they come."""


def fetch(remote: Remote, target: Path, report: Report) -> str:
    """Put the file there. Returns its SHA-256 in hex.

    Raises:
        CommandError: It cannot be had, is not the one that was named, or there is no room for it.
            What arrived is kept where going on with it is possible.
    """
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.closing(_Part(remote, target)) as part:
        return _fetch(part, target, report)


def _fetch(part: _Part, target: Path, report: Report) -> str:
    remote = part.remote
    while True:
        total = _attempts(part, report)
        digest = part.digest()
        if remote.sha256 is None or digest == remote.sha256:
            break
        whole = part.began_at_zero
        part.remove()
        if whole:
            raise CommandError(
                f"{remote.url} is not the file that was asked for: its SHA-256 is {digest}, not "
                f"{remote.sha256}",
                code="E_DIGEST",
                exit_code=EX_DATAERR,
                advice="Do not use it; check where it comes from.",
            )
        # What was there before may have been another file's: once more from the start.
    report(total, total)
    part.become(target)
    return digest


def room_for(size: int, folder: Path) -> None:
    """Check that there is room.

    Raises:
        CommandError: ``E_DISK``, with the figures.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise CommandError(
            f"{out.size(size)} are needed in {folder}, and {out.size(free)} are free",
            code="E_DISK",
            exit_code=EX_IOERR,
            advice="Make room ('pagedd models rm NAME'), or set XDG_CACHE_HOME to another disk.",
        )


class _Part:
    """What has arrived of a file."""

    def __init__(self, remote: Remote, target: Path) -> None:
        self.remote = remote
        name = hashlib.sha256(f"{remote.url}\0{target.name}".encode()).hexdigest()[:16]
        self.path = target.parent / f".pull-{name}.part"
        self._note = target.parent / f".pull-{name}.json"
        self._lock = os.open(self._note, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise CommandError(
                f"another pull of {remote.url} is running",
                code="E_BUSY",
                exit_code=EX_TEMPFAIL,
                advice="Wait for it to end.",
            ) from None
        self.validator: str | None = None
        """Names the very bytes of the file at its host: a strong ETag, or the time of change."""
        self.began_at_zero = True
        try:
            noted = json.loads(self._note.read_text(encoding="utf-8"))
            self.validator = noted["validator"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        if self.validator is None and remote.sha256 is None:
            self.clear()
        self.began_at_zero = self.size == 0

    @property
    def size(self) -> int:
        """Bytes that are here."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def clear(self) -> None:
        """Begin anew."""
        self.path.unlink(missing_ok=True)
        self.began_at_zero = True

    def note(self, validator: str | None) -> None:
        """Write down which bytes these are part of, before there are any."""
        self.validator = validator
        note: dict[str, Any] = {"url": self.remote.url, "validator": validator}
        self._note.write_text(json.dumps(note), encoding="utf-8")

    def digest(self) -> str:
        """SHA-256 of all of it."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    def become(self, target: Path) -> None:
        """The file is whole."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self.path, target)
        self._note.unlink(missing_ok=True)

    def close(self) -> None:
        """Others may go on with it."""
        os.close(self._lock)

    def remove(self) -> None:
        """Nothing of it can be used."""
        self.clear()
        self._note.unlink(missing_ok=True)


def _attempts(part: _Part, report: Report) -> int:
    """Ask until everything is here; the bytes it comes to."""
    failures = 0
    while True:
        before = part.size
        try:
            return _attempt(part, report)
        except (OSError, http.client.HTTPException) as error:
            failures = 0 if part.size > before else failures
            if failures == len(_PAUSES_S):
                raise _broken_off(part, error) from error
            time.sleep(_PAUSES_S[failures])
            failures += 1


def _attempt(part: _Part, report: Report) -> int:
    """One request. Returns the size of the whole file, which is then here.

    Raises:
        OSError, http.client.HTTPException: It broke off.
        CommandError: The host has no such file, or does not give it to us.
    """
    with _answer(part) as answer:
        start, total = _extent(answer, part)
        if start != part.size:
            part.clear()
        if total is not None:
            room_for(total - start, part.path.parent)
        validator = _validator(answer.headers)
        if start == 0 or part.validator is None:
            part.note(validator)
        _receive(answer, part, total, report)
    here = part.size
    wanted = part.remote.size if total is None else total
    if wanted is not None and here != wanted:
        if here > wanted:
            part.clear()
        raise http.client.IncompleteRead(b"", wanted - here)
    return here


@contextlib.contextmanager
def _answer(part: _Part) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request for what is missing."""
    request = urllib.request.Request(part.remote.url)  # noqa: S310 - `pull` takes http(s) alone
    request.add_header("User-Agent", f"pagedd/{__version__}")
    for name, value in part.remote.headers.items():
        request.add_header(name, value)
    if part.size:
        request.add_header("Range", f"bytes={part.size}-")
        if part.validator is not None:
            request.add_header("If-Range", part.validator)
    opener = urllib.request.build_opener(_Redirects)
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and part.size:
                # More is here than there is: another file's, or all of it.
                part.clear()
                raise http.client.IncompleteRead(b"") from error
            if error.code >= 500 or error.code in (408, 429):
                raise OSError(f"the host answered {error.code} {error.reason}") from error
            raise _refused(part.remote.url, error.code) from error


def _extent(answer: http.client.HTTPResponse, part: _Part) -> tuple[int, int | None]:
    """At which byte the answer begins, and how many the file has in all."""
    if answer.status == 206:
        match = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != part.size:
            part.clear()
            raise http.client.IncompleteRead(b"")
        return int(match[1]), None if match[3] == "*" else int(match[3])
    length = answer.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _receive(
    answer: http.client.HTTPResponse, part: _Part, total: int | None, report: Report
) -> None:
    with part.path.open("ab", buffering=0) as file:
        here = file.tell()
        report(here, total)
        while piece := answer.read(_PIECE_BYTES):
            _write(file, piece)
            here += len(piece)
            report(here, total)


def _write(file: io.FileIO, piece: bytes) -> None:
    left = memoryview(piece)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise CommandError(
            f"what arrives cannot be written: {error.strerror}",
            code="E_DISK",
            exit_code=EX_IOERR,
            advice="Make room, or set XDG_CACHE_HOME to another disk; the same command goes on "
            "where this one stopped.",
        ) from error


def _validator(headers: Message) -> str | None:
    etag = headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    return headers.get("Last-Modified")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows, and takes no secret of the first host along to another."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        """As in the library, but for the header."""
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None:
            scheme, host = (urllib.parse.urlsplit(newurl)[i] for i in (0, 1))
            if scheme not in ("http", "https"):
                raise _refused(newurl, code)
            if host != urllib.parse.urlsplit(req.full_url)[1]:
                following.remove_header("Authorization")
        return following


def _refused(url: str, status: int) -> CommandError:
    if status in (401, 403):
        return CommandError(
            f"{url} may not be read ({status})",
            code="E_DENIED",
            exit_code=EX_NOPERM,
            advice="Accept its licence on its page, and set HF_TOKEN for Hugging Face.",
        )
    return CommandError(
        f"there is nothing at {url} ({status})",
        code="E_NOT_FOUND",
        exit_code=EX_NOINPUT,
        advice="Check the name.",
    )


def _broken_off(part: _Part, error: BaseException) -> CommandError:
    reason = getattr(error, "reason", None) or error
    host = urllib.parse.urlsplit(part.remote.url).netloc
    here = f"; {out.size(part.size)} are here" if part.size else ""
    return CommandError(
        f"{host} cannot be reached, or breaks off ({reason}){here}",
        code="E_NETWORK",
        exit_code=EX_TEMPFAIL,
        advice="Check the network; the same command goes on where this one stopped.",
    )
