"""``pagedd completion``: what a shell needs to complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from pagedd.cli._app import commands

VARIABLE = "_PAGEDD_COMPLETE"
"""Set by the shell's function when it asks; click answers it before any command runs."""


def script(shell: str) -> str:
    """The text for a shell."""
    found = get_completion_class(shell)
    assert found is not None
    return found(commands, {}, "pagedd", VARIABLE).source()


@commands.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print completions for SHELL.

    \b
    bash:  pagedd completion bash > ~/.local/share/bash-completion/completions/pagedd
    zsh:   pagedd completion zsh > "${fpath[1]}/_pagedd"
    fish:  pagedd completion fish > ~/.config/fish/completions/pagedd.fish
    """
    click.echo(script(shell))
