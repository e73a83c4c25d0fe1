"""Commands that generate: run and chat."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click

import pagedd
from pagedd.cli import _output as out
from pagedd.cli._app import commands, reaches_daemon

_Command = TypeVar("_Command", bound=Callable[..., Any])

_SAMPLING: tuple[tuple[str, type, str], ...] = (
    ("max-tokens", int, "Tokens to generate at most."),
    ("min-tokens", int, "No stop before this many."),
    ("temperature", float, "0 is greedy."),
    ("top-k", int, "0 is off."),
    ("top-p", float, "1 is off."),
    ("min-p", float, "0 is off."),
    ("typical-p", float, "1 is off."),
    ("repetition-penalty", float, "1 is off."),
    ("presence-penalty", float, "0 is off."),
    ("frequency-penalty", float, "0 is off."),
    ("seed", int, "Draws the same tokens again."),
    ("logprobs", int, "Log-probabilities of the most likely k (with --json)."),
    ("json-schema", str, "The reply is JSON that matches this schema."),
    ("regex", str, "The reply matches this regular expression."),
    ("grammar", str, "The reply is a sentence of this Lark grammar."),
    ("deadline-ms", int, "The daemon gives up after this long."),
)


_STOPPING: dict[str | None, bool] = {"true": True, "false": False}


def generates(command: _Command) -> _Command:
    """Adds the options of a generation; they arrive as keyword arguments, None if not given."""
    for name, kind, text in reversed(_SAMPLING):
        command = click.option(f"--{name}", type=kind, help=text)(command)
    for option in (
        click.option("--ignore-eos", is_flag=True, default=None, help="Go on after end tokens."),
        click.option("--stop", multiple=True, metavar="TEXT", help="Stop before it; repeatable."),
        click.option("--keep-alive", metavar="DURATION", help="How long the model stays loaded."),
        click.option("-m", "--model", help="A name from 'pagedd models'."),
        click.option("--app", default="pagedd-cli", show_default=True, help="Name in 'pagedd ps'."),
        click.option(
            "--priority",
            type=click.Choice(["interactive", "normal", "background"]),
            default="interactive",
            show_default=True,
        ),
        click.option("-v", "--verbose", is_flag=True, help="Tokens and timings afterwards."),
    ):
        command = option(command)
    return reaches_daemon(command)


@commands.command()
@click.argument("prompt")
@click.option("-n", "--samples", "n", type=int, help="Samples to draw, 1 to 16.")
@click.option("--best-of", type=int, help="Draw so many, and show the -n likeliest per token.")
@click.option("--beams", "beam_width", type=int, help="Search with so many beams.")
@click.option("--length-penalty", type=float, help="Of a search; above 0 favours long texts.")
@click.option(
    "--early-stopping",
    type=click.Choice(["true", "false", "never"]),
    callback=lambda _context, _parameter, value: _STOPPING.get(value, value),
    help="Of a search: when it is over.",
)
@click.option("--echo", is_flag=True, default=None, help="Show the prompt too.")
@click.option("--prompt-logprobs", type=int, help="Of the prompt's tokens (with --json).")
@generates
def run(
    prompt: str,
    app: str,
    priority: str,
    verbose: bool,
    json_: bool,
    host: str | None,
    timeout: float,
    **options: Any,
) -> None:
    """Continue PROMPT, or standard input for '-'."""
    if prompt == "-":
        prompt = _decoded(sys.stdin.buffer.read())
    with (
        pagedd.connect(app, priority, host=host, timeout=timeout) as client,
        client.generate(prompt, **_given(options)) as stream,
    ):
        _notice(client, json_)
        several = (options["n"] or 1) > 1
        whole = several or bool(options["echo"])
        _show(stream, quiet=json_ or whole)
        result = stream.result
    if json_:
        out.print_json(dataclasses.asdict(result))
        return
    if options["echo"] and result.prompt is not None:
        click.echo(out.printable(result.prompt.text), nl=several)
    if whole and not several:
        click.echo(out.printable(result.text))
    if several:
        for sample in result.samples:
            click.echo(f"--- {sample.index} ({sample.reason})\n{out.printable(sample.text)}")
    if verbose:
        click.echo(_summary(result), err=True)


@commands.command()
@click.option("--system", metavar="TEXT", help="The system message.")
@click.option("--pin", is_flag=True, help="Keep its KV in RAM while you think.")
@generates
def chat(
    system: str | None,
    pin: bool,
    app: str,
    priority: str,
    verbose: bool,
    json_: bool,
    host: str | None,
    timeout: float,
    **options: Any,
) -> None:
    """Talk with the model, a line a turn.

    Ctrl-C stops a reply, which stays as far as it came; Ctrl-D ends the conversation. Lines may
    come from a pipe.
    """
    turns: list[dict[str, Any]] = []
    given = _given(options)
    interactive = sys.stdin.isatty()
    with pagedd.connect(app, priority, host=host, timeout=timeout) as client:
        _notice(client, json_)
        session = client.session(system=system)
        if pin:
            session.pin()
        for line in _lines(interactive):
            try:
                result = _turn(session, line, given, quiet=json_)
            except pagedd.RequestError as error:
                if not interactive:
                    raise
                click.echo(f"pagedd: {out.printable(str(error))}", err=True)
                continue
            turns.append({"user": line, **dataclasses.asdict(result)})
            if verbose:
                click.echo(_summary(result), err=True)
    if json_:
        out.print_json({"turns": turns})


def _turn(
    session: pagedd.Session, line: str, options: dict[str, Any], *, quiet: bool
) -> pagedd.Completion:
    """One message and its reply. Ctrl-C cancels the reply and nothing else."""
    with session.say(line, **options) as stream:
        try:
            _show(stream, quiet=quiet)
        except KeyboardInterrupt:
            stream.cancel()
            _show(stream, quiet=True)
            click.echo()
            # What was said so far was said: the person may refer to it.
            with contextlib.suppress(pagedd.NothingToCommit):
                session.commit()
        return stream.result


def _lines(interactive: bool) -> Iterator[str]:
    """What the person says: the lines of standard input that are not empty."""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its line editing
    while True:
        try:
            line = input(">>> ") if interactive else _decoded(sys.stdin.buffer.readline())
        except EOFError:
            click.echo()
            return
        if not interactive and not line:
            return
        if line.strip():
            yield line.strip()


def _show(stream: pagedd.Stream, *, quiet: bool) -> None:
    """Print the text as it comes, and a last line end if it has none."""
    last = ""
    terminal = sys.stdout.isatty()
    for chunk in stream:
        if not quiet and chunk.text:
            last = out.printable(chunk.text) if terminal else chunk.text
            click.echo(last, nl=False)
            sys.stdout.flush()
    if not quiet and not last.endswith("\n"):
        click.echo()


def _decoded(data: bytes) -> str:
    """What came from standard input, as text.

    Raises:
        click.UsageError: It is not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"standard input is not UTF-8: {error}") from None


def _given(options: dict[str, Any]) -> Any:
    """The options that were given, as keyword arguments of `pagedd.Client.generate`."""
    return {name: value for name, value in options.items() if value is not None and value != ()}


def _notice(client: pagedd.Client, json_: bool) -> None:
    if client.server.notice and not json_:
        click.echo(f"pagedd: {client.server.notice}", err=True)


def _summary(result: pagedd.Completion) -> str:
    usage, timings = result.usage, result.timings
    speed = usage.generated_tokens / timings.generation_ms * 1000 if timings.generation_ms else 0
    return out.facts(
        [
            ("model", result.model),
            ("prompt", f"{usage.prompt_tokens} tokens, {usage.cached_tokens} cached"),
            ("generated", f"{usage.generated_tokens} tokens, {speed:.1f} tok/s"),
            ("queue", f"{timings.queue_ms:.1f} ms"),
            ("first token", f"{timings.ttft_ms:.1f} ms"),
            ("seed", str(result.seed)),
        ]
    )
