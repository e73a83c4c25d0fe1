"""``pagedd models``: list, show, rm."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import click

import pagedd
from pagedd._paths import models_dir
from pagedd.cli import _output as out
from pagedd.cli._app import (
    EX_NOINPUT,
    EX_NOPERM,
    EX_TEMPFAIL,
    CommandError,
    as_json,
    commands,
    reaches_daemon,
)
from pagedd.cli._daemon import daemon_module
from pagedd.cli._pull import license_of, size_of


@commands.group(invoke_without_command=True)
@reaches_daemon
@click.pass_context
def models(ctx: click.Context, json_: bool, host: str | None, timeout: float) -> None:
    """The models there are: list (what it does alone), show, rm."""
    if ctx.invoked_subcommand is None:
        _list(json_, host, timeout)


@models.command("list")
@reaches_daemon
def list_(json_: bool, host: str | None, timeout: float) -> None:
    """Models that can be named. Never wakes one."""
    _list(json_, host, timeout)


@models.command()
@click.argument("name")
@as_json
def show(name: str, json_: bool) -> None:
    """What the headers of NAME, or of a path, say."""
    entry = resolve(name)
    header = entry.header
    document: dict[str, Any] = {
        **entry.as_map(),
        "aliases": list(entry.aliases),
        "layers": getattr(header, "block_count", None),
        "kv_heads": getattr(header, "kv_heads", None),
        "vocabulary": getattr(header, "vocab_size", None),
        "license": license_of(entry.path).partition(": ")[2] if entry.path else None,
    }
    if json_:
        out.print_json(document)
        return
    document["size_bytes"] = out.size(document["size_bytes"])
    document["parameters"] = out.tokens(document["parameters"])
    document["aliases"] = ", ".join(document["aliases"]) or None
    pairs = [(key.removesuffix("_bytes"), str(value)) for key, value in document.items() if value]
    click.echo(out.printable(out.facts(pairs)))


@models.command()
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@reaches_daemon
def rm(name: str, yes: bool, json_: bool, host: str | None, timeout: float) -> None:
    """Delete a model that 'pagedd pull' got. What lies elsewhere is left alone."""
    entry = resolve(name)
    folder = models_dir()
    path = entry.path
    if path is None or path.parent.resolve() != folder.resolve():
        raise CommandError(
            f"{entry.name} is not in {folder}" + (f", but at {path}" if path else ""),
            code="E_ELSEWHERE",
            exit_code=EX_NOPERM,
            advice="Delete it by hand, if it is yours to delete.",
        )
    if entry.name in _loaded(host, timeout):
        raise CommandError(
            f"{entry.name} is loaded",
            code="E_LOADED",
            exit_code=EX_TEMPFAIL,
            advice="Unload it first: pagedd unload",
        )
    size = size_of(path)
    if not yes and sys.stdin.isatty():
        click.confirm(f"delete {path} ({out.size(size)})?", abort=True, err=True)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if json_:
        out.print_json({"removed": str(path), "size_bytes": size})
    else:
        click.echo(f"removed {path} ({out.size(size)})")


def resolve(name: str) -> Any:
    """A `pagedd_daemon.models.registry.ModelEntry`, found without the daemon.

    Raises:
        CommandError: There is no such model, or its file is no model.
    """
    registry = daemon_module("models.registry")
    errors = daemon_module("models.errors")
    try:
        return registry.Registry().resolve(name)
    except errors.ModelError as error:
        raise CommandError(
            error.message,
            code=error.code,
            exit_code=EX_NOINPUT,
            advice="See 'pagedd models' for what there is, or get one with 'pagedd pull'.",
        ) from None


def _list(json_: bool, host: str | None, timeout: float) -> None:
    try:
        with pagedd.connect("pagedd-cli", host=host, timeout=timeout) as client:
            found = client.models()
    except pagedd.DaemonNotRunning:
        entries = daemon_module("models.registry").Registry().list()
        found = [{**entry.as_map(), "loaded": False} for entry in entries]
    if json_:
        out.print_json({"models": found})
        return
    rows = [
        [
            str(model["name"]),
            out.size(model["size_bytes"]),
            str(model["architecture"] or "-"),
            str(model["quantization"] or "-"),
            out.tokens(model["context_tokens"]),
            "loaded" if model["loaded"] else "",
        ]
        for model in found
    ]
    click.echo(out.table(["NAME", "SIZE", "FAMILY", "QUANT", "CONTEXT", "STATE"], rows))
    if not rows:
        click.echo("There is none yet: 'pagedd pull' gets the default one.", err=True)


def _loaded(host: str | None, timeout: float) -> set[str]:
    try:
        with pagedd.control(host=host, timeout=timeout) as control:
            return {str(model["name"]) for model in control.status()["models"]}
    except pagedd.ConnectionFailed:
        return set()
