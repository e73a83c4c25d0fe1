"""``pagedd plan``: what a model takes, and what fits, before it is loaded."""

from __future__ import annotations

from typing import Any

import click
import psutil

from pagedd.cli import _output as out
from pagedd.cli._app import EX_NOINPUT, EX_UNAVAILABLE, CommandError, as_json, commands
from pagedd.cli._daemon import daemon_module
from pagedd.cli._machine import gpus
from pagedd.cli._models import resolve


@commands.command()
@click.argument("model")
@click.option("--context", type=click.IntRange(min=1), help="Tokens of one conversation.")
@as_json
def plan(model: str, context: int | None, json_: bool) -> int:
    """What MODEL (a name or a path) takes, and what fits. Reads headers and loads nothing.

    FITS is the tokens of KV that there is room for beside the weights; CONVERSATIONS how many of
    the model's full context, or of --context, that is. Exits 69 where the model fits nowhere.
    """
    entry = resolve(model)
    module, errors = daemon_module("models.footprint"), daemon_module("models.errors")
    if entry.path is None:
        raise CommandError(f"{entry.name} has no weights", code="E_MODEL", exit_code=EX_NOINPUT)
    try:
        takes = module.footprint(entry.path)
    except errors.ModelError as error:
        raise CommandError(error.message, code=error.code, exit_code=EX_NOINPUT) from None
    length = context or takes.context_tokens or 4096
    free = psutil.virtual_memory().available
    where = [_place("CPU (llama.cpp)", takes.cpu, free, length)]
    where += [_place(gpu.name, takes.gpu, gpu.free_bytes, length) for gpu in gpus()]
    if json_:
        out.print_json(
            {
                "model": entry.name,
                "path": str(entry.path),
                "context_tokens": takes.context_tokens,
                "gpu_reason": takes.gpu_reason or None,
                "places": where,
            }
        )
    else:
        _show(entry.name, takes, where, length)
    if not any(place["fits_tokens"] and place["fits_tokens"] > 0 for place in where):
        if json_:
            return EX_UNAVAILABLE
        raise CommandError(
            f"{entry.name} fits nowhere on this machine",
            code="E_NEVER_FITS",
            exit_code=EX_UNAVAILABLE,
            advice="Close what takes memory, or take a smaller or more quantised model.",
        )
    return 0


def _place(name: str, takes: Any, free: int, length: int) -> dict[str, Any]:
    if takes is None:
        return {"place": name, "free_bytes": free, "weights_bytes": None, "fits_tokens": None}
    tokens = takes.tokens_that_fit(free)
    return {
        "place": name,
        "free_bytes": free,
        "weights_bytes": takes.weights,
        "kv_bytes_per_1000_tokens": takes.kv_per_1000_tokens,
        "reserve_bytes": takes.reserve,
        "fits_tokens": tokens,
        "conversations": round(max(0, tokens) / length, 1),
    }


def _show(name: str, takes: Any, where: list[dict[str, Any]], length: int) -> None:
    header = ["WHERE", "FREE", "WEIGHTS", "KV/1000 TOKENS", "FITS", "CONVERSATIONS"]
    rows = []
    for place in where:
        tokens = place["fits_tokens"]
        fits = "-" if tokens is None else out.tokens(tokens) if tokens > 0 else "does not fit"
        rows.append(
            [
                place["place"],
                out.size(place["free_bytes"]),
                out.size(place["weights_bytes"]),
                out.size(place.get("kv_bytes_per_1000_tokens")),
                fits,
                out.number(place.get("conversations"), 1),
            ]
        )
    click.echo(out.table(header, rows, right=" ".join(["FREE", "WEIGHTS", "FITS"])))
    made_for = out.tokens(takes.context_tokens)
    click.echo(f"\n{name} was made for {made_for} tokens; a conversation here has {length}.")
    if takes.gpu_reason:
        click.echo(f"Not on a GPU: it {takes.gpu_reason}.")
