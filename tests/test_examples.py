"""Every example runs, is short, and does what its first line says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import RunningDaemon, running_daemon

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon() as running:
        yield running


def example(daemon: RunningDaemon, name: str, *arguments: str, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env=daemon.env,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_each_is_below_80_lines_and_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    programs = sorted(EXAMPLES.glob("*.py"))
    assert len(programs) == 4
    for program in programs:
        assert len(program.read_text().splitlines()) < 80, program.name
        assert f"`{program.name}`" in listed


def test_autocomplete_completes_the_newest_state(daemon: RunningDaemon) -> None:
    states = "def f(n):\n\fdef fi(n):\n\fdef fib(n):\n    "
    assert example(daemon, "autocomplete.py", stdin=states).strip()


def test_branches_find_the_history_of_their_trunk(daemon: RunningDaemon) -> None:
    text = example(daemon, "chat_forks.py", "Name a river. " * 20, "A shorter one.", "In Africa.")
    assert text.count("> (branch)") == 2
    branch = text.split("> (branch)")[1]
    assert int(branch.rpartition("\n  (")[2].split()[0]) > 0, "tokens were found"


def test_an_agent_takes_steps_that_can_be_read(daemon: RunningDaemon) -> None:
    text = example(daemon, "agent.py", "What is 6 times 7?")
    first = text.splitlines()[0]
    assert first.partition(":")[0] in ("multiply", "today", "answer", "it went on and on")


def test_a_batch_is_summarised_whole(daemon: RunningDaemon, tmp_path: Path) -> None:
    paths = []
    for number in range(5):
        path = tmp_path / f"{number}.txt"
        path.write_text(f"The story of {number}.\n" * 30)
        paths.append(str(path))
    text = example(daemon, "summarise.py", *paths)
    assert (
        sorted(line.partition(": ")[0] for line in text.splitlines() if ".txt: " in line) == paths
    )
    assert "failed" not in text
