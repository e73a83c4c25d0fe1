"""The command ``pagedd`` in this process: fast, for commands that need no daemon of their own."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from typing import Any

from pagedd.cli._app import main


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended."""

    status: int
    out: str
    err: str

    def document(self) -> Any:
        """Its one JSON document."""
        return json.loads(self.out)


def run(*arguments: str) -> Ran:
    """Run a command to its end."""
    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as ended:
            status = ended.code
    return Ran(int(str(status or 0)), out.getvalue(), err.getvalue())
