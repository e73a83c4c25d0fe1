"""Writes manual pages from the commands themselves: ``python make_man.py FOLDER``."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from pagedd import __version__
from pagedd.cli._app import commands, load_commands

_SEE = "Full documentation: https://github.com/pagedd/pagedd/tree/main/docs"


def pages() -> Iterator[tuple[str, str]]:
    """File name and text of each page: ``pagedd.1``, and one for each command."""
    load_commands()
    with click.Context(commands, info_name="pagedd") as context:
        yield "pagedd.1", _overview(context)
        for name in commands.list_commands(context):
            command = commands.get_command(context, name)
            if command is not None and not command.hidden:
                yield f"pagedd-{name}.1", _page(command, name, context)


def _overview(context: click.Context) -> str:
    lines = _head("pagedd", "share one language model among the apps of this machine")
    lines += [".SH SYNOPSIS", r"\fBpagedd\fR \fICOMMAND\fR [\fIOPTIONS\fR]", ".SH DESCRIPTION"]
    lines += _text(commands.help or "")
    lines.append(".SH COMMANDS")
    for name in commands.list_commands(context):
        command = commands.get_command(context, name)
        if command is not None and not command.hidden:
            lines += [
                ".TP",
                rf"\fBpagedd-{_roff(name)}\fR(1)",
                _roff(command.get_short_help_str(90)),
            ]
    lines += [".SH ENVIRONMENT", ".TP", r"\fBPAGEDD_HOST\fR"]
    lines += [r"unix:///PATH of the daemon's socket.", ".SH EXIT STATUS"]
    lines += [r"As in \fIsysexits.h\fR: 0, 64 wrong usage, 65 wrong data, 66 no such model,"]
    lines += ["69 no daemon, 74 disk, 75 try again, 77 no right, 78 wrong settings."]
    return "\n".join([*lines, ".SH SEE ALSO", _roff(_SEE)]) + "\n"


def _page(command: click.Command, name: str, parent: click.Context) -> str:
    lines = _head(f"pagedd-{name}", command.get_short_help_str(90))
    lines.append(".SH SYNOPSIS")
    lines += _synopsis(command, f"pagedd {name}", parent)
    lines.append(".SH DESCRIPTION")
    lines += _text(command.help or "")
    lines += _options(command, name, parent)
    if isinstance(command, click.Group):
        with click.Context(command, info_name=name, parent=parent) as context:
            for sub in command.list_commands(context):
                found = command.get_command(context, sub)
                assert found is not None
                lines.append(f'.SH "{_roff(f"pagedd {name} {sub}").upper()}"')
                lines += _synopsis(found, f"pagedd {name} {sub}", context)
                lines += [".PP", *_text(found.help or ""), *_options(found, sub, context, ".PP")]
    lines += [".SH SEE ALSO", r"\fBpagedd\fR(1)", ".PP", _roff(_SEE)]
    return "\n".join(lines) + "\n"


def _head(name: str, sentence: str) -> list[str]:
    sentence = sentence.rstrip(".")
    title = f'.TH "{name.upper()}" "1" "" "pagedd {__version__}" "pagedd"'
    return [title, ".SH NAME", rf"{_roff(name)} \- {_roff(sentence)}"]


def _synopsis(command: click.Command, words: str, parent: click.Context) -> list[str]:
    with click.Context(command, info_name=words, parent=parent) as context:
        usage = " ".join(command.collect_usage_pieces(context))
    return [rf"\fB{_roff(words)}\fR {_roff(usage)}"]


def _options(
    command: click.Command, name: str, parent: click.Context, heading: str = ".SH OPTIONS"
) -> list[str]:
    lines: list[str] = []
    with click.Context(command, info_name=name, parent=parent) as context:
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None:
                lines += [".TP", rf"\fB{_roff(record[0])}\fR", _roff(record[1])]
    return [heading, *lines] if lines else []


def _text(text: str) -> list[str]:
    lines: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b\n"):
            lines += [".nf", *map(_roff, paragraph[2:].split("\n")), ".fi", ".PP"]
        else:
            lines += [_roff(" ".join(paragraph.split())), ".PP"]
    return lines[:-1]


def _roff(text: str) -> str:
    """Text as roff wants it: backslashes, hyphens, and no line that looks like a request."""
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("…", "...")
    return re.sub(r"^([.'])", r"\\&\1", text)


def main() -> int:
    """Write them all into a folder."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages():
        (folder / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
