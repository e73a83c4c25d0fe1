"""The group of commands, and what becomes of their errors.

Every command ends in one of two ways: it returns, or it raises. `main` turns what is raised into
one line for people or one JSON document, and into an exit code of sysexits.h.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import click

from pagedd._errors import (
    AccessDenied,
    ConnectionFailed,
    InternalError,
    InvalidRequest,
    ModelError,
    PageddError,
    PromptTooLong,
    ProtocolViolation,
)
from pagedd._verbs import DEFAULT_TIMEOUT_S
from pagedd.cli._output import nearest, print_json, printable

EX_USAGE = 64
EX_DATAERR = 65
EX_NOINPUT = 66
EX_UNAVAILABLE = 69
EX_SOFTWARE = 70
EX_CANTCREAT = 73
EX_IOERR = 74
EX_TEMPFAIL = 75
EX_PROTOCOL = 76
EX_NOPERM = 77
EX_CONFIG = 78
EX_INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""

_EXIT_CODES: tuple[tuple[type[PageddError], int], ...] = (
    (AccessDenied, EX_NOPERM),
    (ConnectionFailed, EX_UNAVAILABLE),
    (ProtocolViolation, EX_PROTOCOL),
    (PromptTooLong, EX_DATAERR),
    (InvalidRequest, EX_USAGE),
    (ModelError, EX_NOINPUT),
    (InternalError, EX_SOFTWARE),
)

_ADVICE = {
    "E_ACCESS": "Run it as the user whose daemon it is.",
    "E_BUSY": "Wait until something is done, or see 'pagedd ps'.",
    "E_CONFIG": "Correct it, then try again.",
    "E_SESSION_LOST": "See with 'pagedd status' whether it is back, then try again.",
    "E_CONNECTION": "See with 'pagedd status' whether it is back, then try again.",
    "E_DEADLINE": "Try again, or give it more time.",
    "E_DRAINING": "Start the daemon again with 'pagedd serve', then try again.",
    "E_ENGINE": "Try again; the daemon restarts its engine by itself.",
    "E_FORBIDDEN": "Run it as the user whose daemon it is.",
    "E_HOST": "Unset it to use the default socket.",
    "E_INTERNAL": "This is a defect: please report it with the daemon's log.",
    "E_MODEL": "See 'pagedd models' for what there is, or get the default with 'pagedd pull'.",
    "E_NEVER_FITS": "Shorten the prompt, or start the daemon with more --kv-tokens.",
    "E_NO_EMBEDDING": "Use a backend that computes them: llama.cpp.",
    "E_NO_MODEL": "Name one with --model, or get the default with 'pagedd pull'.",
    "E_NO_TOKENIZER": "Use a model that brings its tokeniser.",
    "E_NOT_INSTALLED": "Install it with: pip install 'pagedd[cpu]'",
    "E_PROTOCOL": "Client and daemon differ in version: restart the daemon after an upgrade.",
    "E_TIMEOUT": "See 'pagedd ps' for what it does, or wait longer with --timeout.",
    "E_TOO_LONG": "Shorten the prompt, or start the daemon with a larger --context.",
    "E_VERSION": "Client and daemon differ in version: restart the daemon after an upgrade.",
}

_Command = TypeVar("_Command", bound=Callable[..., Any])


_MODULES = (
    *(
        "_act",
        "_apps",
        "_ask",
        "_cache",
        "_completion",
        "_config",
        "_doctor",
        "_gateway",
        "_keys",
        "_metrics",
        "_models",
    ),
    *("_plan", "_pull", "_serve", "_service", "_show", "_top"),
)


class CommandError(PageddError):
    """What a command itself finds wrong.

    Attributes:
        exit_code: Of sysexits.h.
        advice: What to do about it, one sentence.
    """

    def __init__(self, message: str, *, code: str, exit_code: int, advice: str = "") -> None:
        super().__init__(message, code=code)
        self.exit_code = exit_code
        self.advice = advice


class Commands(click.Group):
    """A group that answers a misspelt command with the nearest one."""

    group_class = type
    """Groups within are of this kind too (click's word for it)."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As in click, with a better error.

        Raises:
            click.UsageError: There is no such command.
        """
        name = args[0] if args else ""
        if name and not name.startswith("-") and self.get_command(ctx, name) is None:
            near = nearest(name, self.list_commands(ctx))
            hint = f": did you mean '{near}'?" if near else ""
            raise click.UsageError(f"there is no command '{name}'{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def commands() -> None:
    """Share one language model among the apps of this machine.

    'pagedd serve' is the daemon; everything else talks to it.
    """


def as_json(command: _Command) -> _Command:
    """Adds ``--json``."""
    return click.option(
        "--json", "json_", is_flag=True, help="One JSON document on standard output."
    )(command)


def reaches_daemon(command: _Command) -> _Command:
    """Adds ``--json`` and what says which daemon, and how long to wait for it."""
    host = click.option(
        "--host", metavar="unix:///PATH", help="The daemon's socket. [default: $PAGEDD_HOST]"
    )
    timeout = click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=DEFAULT_TIMEOUT_S,
        show_default=True,
        metavar="SECONDS",
        help="The longest wait for an answer, or for the next piece of one.",
    )
    return as_json(host(timeout(command)))


def load_commands() -> None:
    """Import every command's module, which registers it."""
    for name in _MODULES:
        importlib.import_module(f"pagedd.cli.{name}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    load_commands()

    try:
        status = commands.main(given, prog_name="pagedd", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (`| head`). Python would complain while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EX_IOERR)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(EX_INTERRUPTED)
    except (PageddError, click.ClickException) as error:
        sys.exit(_report(error, "--json" in given))
    except OSError as error:
        sys.exit(_report(_from_system(error), "--json" in given))
    sys.exit(status if isinstance(status, int) else 0)


def _from_system(error: OSError) -> CommandError:
    """What the operating system refused, with what to do about it."""
    if isinstance(error, PermissionError):
        advice = "Run it as the owner, or give yourself the right."
        return CommandError(str(error), code="E_PERMISSION", exit_code=EX_NOPERM, advice=advice)
    advice = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "Make room on that disk, then try again."
    return CommandError(str(error), code="E_IO", exit_code=EX_IOERR, advice=advice)


def exit_code_of(error: PageddError | click.ClickException) -> int:
    """The code of sysexits.h for an error."""
    if isinstance(error, CommandError):
        return error.exit_code
    if isinstance(error, click.UsageError):
        return EX_USAGE
    if isinstance(error, click.ClickException):
        return EX_NOINPUT if isinstance(error, click.FileError) else error.exit_code
    if error.code in ("E_HOST", "E_CONFIG"):
        return EX_CONFIG
    for kind, code in _EXIT_CODES:
        if isinstance(error, kind):
            return code
    return EX_TEMPFAIL if error.retryable else EX_SOFTWARE


def _report(error: PageddError | click.ClickException, json_: bool) -> int:
    """Says what is wrong and what to do."""
    exit_code = exit_code_of(error)
    if isinstance(error, PageddError):
        message, code = str(error), error.code
        advice = error.advice if isinstance(error, CommandError) else _ADVICE.get(code, "")
        details, retryable = error.details, error.retryable
    else:
        message, code, details, retryable = error.format_message(), "E_USAGE", {}, False
        context = error.ctx if isinstance(error, click.UsageError) else None
        advice = f"See '{context.command_path} --help'." if context is not None else ""
    if json_:
        print_json(
            {
                "error": {
                    "code": code,
                    "message": message,
                    "advice": advice or None,
                    "retryable": retryable,
                    "details": details,
                    "exit_code": exit_code,
                }
            }
        )
    else:
        end = "" if message.endswith((".", "!", "?")) else "."
        click.echo(
            f"pagedd: {printable(message)}{end}" + (f" {advice}" if advice else ""), err=True
        )
    return exit_code
