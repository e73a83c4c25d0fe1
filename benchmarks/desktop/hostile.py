"""An app beside a neighbour that does what it can to be in its way."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.desktop.attacker import ATTACKS
from benchmarks.desktop.figures import first_tokens_ms, outcomes, percentile, spread
from benchmarks.desktop.servers import DesktopDaemon, play
from benchmarks.desktop.trace import App, Ask, text
from benchmarks.report import ROOT, Report, Row
from benchmarks.service import environment

POOL_TOKENS = 8_192
_WARM_S = 4.0
"""By then the attack is under way."""


def hostile_neighbours(report: Report, threads: int) -> None:
    """For each attack the victim's time to the first token, against what it is alone."""
    victim = _victim(1, 12 if report.quick else 30)
    told: dict[str, dict[str, object]] = {victim.name: {"class": victim.klass}}
    with tempfile.TemporaryDirectory(prefix="pagedd-bench-") as folder:
        for number, (attack, (what, _)) in enumerate(ATTACKS.items()):
            with DesktopDaemon(POOL_TOKENS, threads, told) as ours:
                by_itself = play(ours.server, [_victim(2, len(victim.asks))], 120.0)[victim.name]
                with _attacking(Path(folder), ours.daemon.host, attack):
                    time.sleep(_WARM_S)
                    asked = _victim(3 + number, len(victim.asks))
                    records = play(ours.server, [asked], 120.0)[victim.name]
            idle, busy = first_tokens_ms(by_itself), first_tokens_ms(records)
            most = 2 * percentile(idle, 0.95)
            ended = ", ".join(f"{n} {how}" for how, n in sorted(outcomes(records).items()))
            note = f"alone: {spread(idle, len(idle))}; under it: {spread(busy, len(busy))}; {ended}"
            row = f"a neighbour with {what}: victim's TTFT p95"
            report.add(Row(row, percentile(busy, 0.95), "ms", f"<= {most:.1f}", note))


def _victim(seed: int, asks: int) -> App:
    """An app with short questions; the texts differ, since what was asked before is found."""
    dice = random.Random(seed)
    made = tuple(Ask(text(dice, 40), 8, dice.uniform(0.3, 0.7)) for _ in range(asks))
    return App("victim", "interactive", "talk", made)


@contextmanager
def _attacking(folder: Path, host: str, attack: str) -> Iterator[None]:
    """The attack, by a copy of this interpreter: shares are divided between executables first."""
    program = folder / "attacker"
    if not program.exists():
        shutil.copy2(os.path.realpath(sys.executable), program)
    paths = [str(ROOT), *(path for path in sys.path if path)]
    process = subprocess.Popen(
        [str(program), "-m", "benchmarks.desktop.attacker", host, attack],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": os.pathsep.join(paths), "PYTHONHOME": sys.base_prefix},
        stdin=subprocess.DEVNULL,
    )
    try:
        yield
        if process.poll() is not None:
            raise RuntimeError(f"the attack {attack!r} ended by itself: {process.returncode}")
    finally:
        process.kill()
        process.wait()
