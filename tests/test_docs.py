"""The documentation: every command and program in it works, and no link leads nowhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.daemon import RunningDaemon, running_daemon

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
_PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Command:
    """One line of a page that begins with ``$``."""

    page: str
    line: str


def commands(page: Path) -> list[Command]:
    """What a page tells people to type, in order."""
    lines = [line for block in _BLOCK.findall(page.read_text()) for line in block.splitlines()]
    return [Command(page.name, line[2:]) for line in lines if line.startswith("$ ")]


SERVING = ("pagedd serve", "pagedd metrics --listen")
WITH_COMMANDS = [page for page in PAGES if commands(page)]


@dataclass(frozen=True, slots=True)
class Desk:
    """A running daemon, and an environment in which ``pagedd`` is a command."""

    daemon: RunningDaemon
    env: dict[str, str]


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with (
        running_daemon(drain="2s") as daemon,
        tempfile.TemporaryDirectory(prefix="pagedd-") as folder,
    ):
        programs = {
            "pagedd": f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m pagedd "$@"\n',
            # A service manager that does as it is told, and keeps nothing of it.
            "systemctl": "#!/bin/sh\nexit 0\n",
            "journalctl": "#!/bin/sh\nexit 0\n",
        }
        for name, text in programs.items():
            path = Path(folder) / name
            path.write_text(text)
            path.chmod(0o755)
        # The default model is taken from the installed package: no network.
        env = {**daemon.env, "PATH": f"{folder}:{os.environ['PATH']}", "PIP_NO_INDEX": "1"}
        env["HOME"] = folder
        yield Desk(daemon, env)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_every_command_of_a_page_works(desk: Desk, page: Path) -> None:
    for command in commands(page):
        if command.line.startswith("pip install"):
            _is_ours(command)
            continue
        if command.line.startswith(SERVING):
            _serves(desk, command)
            continue
        done = subprocess.run(
            ["sh", "-c", command.line],
            env=desk.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    "page", [p for p in PAGES if _PYTHON.search(p.read_text())], ids=lambda page: page.name
)
def test_every_program_of_a_page_works(desk: Desk, page: Path) -> None:
    for program in _PYTHON.findall(page.read_text()):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=desk.env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{page.name}\n{program}\n{done.stdout}{done.stderr}"


def _serves(desk: Desk, command: Command) -> None:
    """What runs until it is ended says first that it serves, and ends well."""
    line = command.line.replace(":9178", ":0")  # somebody may have that port
    env = desk.env
    if line.startswith("pagedd serve"):  # beside the one that runs
        env = {name: value for name, value in env.items() if name != "PAGEDD_HOST"}
    process = subprocess.Popen(shlex.split(line), env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = []
        for text in process.stderr:
            said.append(text)
            if "serving " in text or "serves in " in text:
                break
        else:
            raise AssertionError(f"{command}\n{''.join(said)}")
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode in (0, 130), command
    finally:
        process.kill()
        process.wait()


def _is_ours(command: Command) -> None:
    """Installing is `make dist-test`'s; here, that what is installed exists."""
    words = shlex.split(command.line)
    extra = re.fullmatch(r"pagedd(?:\[(\w+)\])?", words[2])
    assert extra is not None, command
    assert extra[1] is None or f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text()


def test_the_site_builds_and_no_link_leads_nowhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "index.html").exists()


def test_a_link_to_a_file_that_is_not_there_is_found(tmp_path: Path) -> None:
    for name in ("mkdocs.yml", "docs", "packaging", "README.md", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    docs = tmp_path / "docs"
    docs.unlink()
    docs.mkdir()
    (docs / "index.md").write_text("[gone](../none.md)\n")
    config = tmp_path / "mkdocs.yml"
    text = config.read_text()
    config.unlink()
    config.write_text(text[: text.index("nav:")])
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "none.md, which does not exist" in done.stderr


def test_the_quick_start_fits_a_screen() -> None:
    text = (ROOT / "docs" / "index.md").read_text()
    assert len(text.splitlines()) <= 45
