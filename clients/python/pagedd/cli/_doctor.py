"""``pagedd doctor``: what keeps the daemon from running well here, and what to do about it."""

from __future__ import annotations

import dataclasses

import click

from pagedd.cli import _output as out
from pagedd.cli._app import EX_UNAVAILABLE, as_json, commands


@commands.command()
@as_json
def doctor(json_: bool) -> int:
    """Look at packages, driver, memory, limits, disk, models, settings and the socket.

    Exits 0 if everything can work, 69 if something cannot. Changes nothing.
    """
    from pagedd.cli import _checks

    findings = []
    for finding in _checks.every():
        findings.append(finding)
        if not json_:
            click.echo(out.printable(f"{finding.state:4}  {finding.check:9} {finding.found}"))
            if finding.advice:
                click.echo(out.printable(f"                {finding.advice}"))
    failed = sum(finding.state == "fail" for finding in findings)
    if json_:
        rows = [dataclasses.asdict(finding) for finding in findings]
        out.print_json({"findings": rows, "failed": failed})
    return EX_UNAVAILABLE if failed else 0
