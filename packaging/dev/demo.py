"""``make demo``: four apps talk to one daemon at the same time.

On a terminal their streams run side by side in four columns; elsewhere as lines with the app's
name in front. Then the daemon's own figures, and a clean stop. Exit status 1 if anything failed.
"""

from __future__ import annotations

import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

PAGEDD = str(Path(sys.executable).with_name("pagedd"))
APPS_PROGRAM = str(Path(__file__).with_name("demo_apps.py"))
MODEL = "smollm2"
APPS = {
    "editor": ("interactive", "cyan"),
    "chat": ("normal", "green"),
    "agent": ("normal", "magenta"),
    "summariser": ("background", "yellow"),
}
START_SECONDS = 60.0
TALK_SECONDS = 120.0

console = Console()


class DemoError(Exception):
    """Something that should have worked did not."""


def pagedd(*arguments: str, host: str) -> str:
    """The output of a ``pagedd`` command.

    Raises:
        DemoError: It failed.
    """
    done = subprocess.run(
        [PAGEDD, *arguments],
        env={**os.environ, "PAGEDD_HOST": host, "COLUMNS": str(min(console.width, 110))},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise DemoError(f"pagedd {' '.join(arguments)} exited {done.returncode}: {done.stderr}")
    return done.stdout


def shell_line(*words: str) -> None:
    """A command, as a person would have typed it."""
    console.print(f"$ {shlex.join(words)}", style="bold", highlight=False)


@contextmanager
def daemon(folder: Path) -> Iterator[str]:
    """A running ``pagedd serve``; stopped at the end, and its exit status shown.

    Raises:
        DemoError: It did not become ready, or did not exit 0.
    """
    log = folder / "daemon.log"
    command = ["serve", "--model", MODEL, "--socket-dir", str(folder)]
    shell_line("pagedd", *command)
    with log.open("wb") as stream:
        process = subprocess.Popen([PAGEDD, *command], stdout=stream, stderr=stream)
    host = f"unix://{folder / 'pagedd.sock'}"
    try:
        started = time.monotonic()
        while not ready(host):
            if process.poll() is not None or time.monotonic() - started > START_SECONDS:
                raise DemoError(f"the daemon did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.1)
        console.print(f"ready after {time.monotonic() - started:.1f} s\n", highlight=False)
        yield host
    finally:
        status = stop(process)
        console.print(f"the daemon ended with exit status {status}", highlight=False)
    if status != 0:
        raise DemoError(f"the daemon exited {status}:\n{log.read_text(errors='replace')}")


def ready(host: str) -> bool:
    """Whether a request would be served now."""
    try:
        return bool(json.loads(pagedd("status", "--json", host=host))["state"] == "ready")
    except DemoError:
        return False


def stop(process: subprocess.Popen[bytes]) -> int:
    """SIGTERM, and the exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


class Screen:
    """What the apps have said so far: columns on a terminal, lines with a name elsewhere."""

    def __init__(self) -> None:
        self._texts = {name: Text() for name in APPS}
        self._unfinished = dict.fromkeys(APPS, "")
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, app: str, kind: str, text: str) -> None:
        """A piece of an app's stream."""
        if self._live is not None:
            style = {"ask": "bold", "note": "dim italic"}.get(kind, APPS[app][1])
            if kind != "text" and self._texts[app] and not self._texts[app].plain.endswith("\n"):
                self._texts[app].append("\n")
            self._texts[app].append(text if kind == "text" else f"{text.strip()}\n", style=style)
            self._live.update(self._columns(), refresh=True)
        elif kind == "text":
            self._print_lines(app, self._unfinished[app] + text, last=False)
        else:
            self._print_lines(app, self._unfinished[app], last=True)
            self._print_lines(app, ("> " if kind == "ask" else "  ") + text.strip(), last=True)

    def _print_lines(self, app: str, text: str, *, last: bool) -> None:
        """Print whole lines, and what is long enough to be one; keep the rest."""
        *lines, rest = text.split("\n")
        while len(rest) > 80:
            lines.append(rest[:80])
            rest = rest[80:]
        if last and rest:
            lines.append(rest)
            rest = ""
        self._unfinished[app] = rest
        for line in lines:
            if line.strip():
                print(f"{app:>10} | {line}", flush=True)

    def _columns(self) -> Table:
        grid = Table.grid(expand=True)
        height = max(8, console.height - 10)
        width = max(20, console.width // len(APPS) - 4)
        panels = []
        for app, (priority, style) in APPS.items():
            grid.add_column(ratio=1)
            lines = self._texts[app].wrap(console, width)[-height:]
            title = f"{app} ({priority})"
            panels.append(Panel(Group(*lines), title=title, border_style=style, height=height + 2))
        grid.add_row(*panels)
        return grid


def talk(host: str) -> str:
    """Run the four apps at the same time; what ``pagedd ps`` said while all of them talked.

    Raises:
        DemoError: One of them failed.
    """
    events: queue.Queue[tuple[str, str, str]] = queue.Queue()

    def read(app: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            events.put((app, *json.loads(line)))
        events.put((app, "exit", str(process.wait())))

    processes = {
        app: subprocess.Popen(
            [sys.executable, APPS_PROGRAM, app, "--host", host], stdout=subprocess.PIPE, text=True
        )
        for app in APPS
    }
    for app, process in processes.items():
        threading.Thread(target=read, args=(app, process), daemon=True).start()
    talking: set[str] = set()
    exits: dict[str, str] = {}
    listing = ""
    end = time.monotonic() + TALK_SECONDS
    try:
        with Screen() as screen:
            while len(exits) < len(APPS):
                try:
                    app, kind, text = events.get(timeout=max(0.0, end - time.monotonic()))
                except queue.Empty:
                    raise DemoError(f"not finished within {TALK_SECONDS:g} s") from None
                if kind == "exit":
                    exits[app] = text
                else:
                    screen.add(app, kind, text)
                if kind == "text":
                    talking.add(app)
                # When all of them have been answered, or the first one leaves before that.
                if not listing and (len(talking) == len(APPS) or exits):
                    listing = pagedd("ps", host=host)
    finally:
        for process in processes.values():
            process.kill()
    if failed := [app for app, status in exits.items() if status != "0"]:
        raise DemoError(f"failed: {', '.join(failed)}")
    return listing


def main() -> int:
    """Exit status 0 if everything worked."""
    started = time.monotonic()
    # Ending early still ends the daemon and the apps.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with (
            tempfile.TemporaryDirectory(prefix="pagedd-demo-") as folder,
            daemon(Path(folder)) as host,
        ):
            listing = talk(host)
            console.print("\nWhile the four of them were talking:", highlight=False)
            shell_line("pagedd", "ps")
            print(listing)
            shell_line("pagedd", "stats")
            print(pagedd("stats", host=host))
            shell_line("kill", "-TERM", "PID")
    except DemoError as error:
        console.print(f"demo failed: {error}", style="bold red", highlight=False)
        return 1
    console.print(f"demo done in {time.monotonic() - started:.0f} s", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
