"""llama.cpp's own server, to be measured beside the daemon: built once, found again, and run.

It comes from the source release of llama-cpp-python, so that both sides compute with the same
llama.cpp. ``python -m benchmarks.desktop.peer`` builds it and prints where it is.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

from pagedd._paths import cache_dir

START_SECONDS = 120.0
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    # Its page would be fetched while building; TLS is of no use on loopback.
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)


class PeerError(Exception):
    """The server could not be built or does not start; the end of its log is in the message."""


def version() -> str:
    """The release of llama-cpp-python that is installed, whose llama.cpp the daemon uses."""
    return importlib.metadata.version("llama-cpp-python")


def server_path() -> Path:
    """Where the server lies once it is built."""
    return cache_dir() / "bench" / f"llama-server-{version()}"


def _run(log: Path, *command: str) -> None:
    with log.open("ab") as output:
        status = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
    if status:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise PeerError(f"{command[0]} exited {status}:\n{end}")


def build(jobs: int) -> Path:
    """`server_path`, built first unless it is there: some 20 minutes of one core.

    Raises:
        PeerError: It cannot be downloaded or compiled; the build tree is kept, so that another
            call goes on where this one stopped.
    """
    target = server_path()
    if target.is_file():
        return target
    folder = target.with_name(f"{target.name}.build")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    release = f"llama_cpp_python-{version()}"
    if not (folder / release).is_dir():
        wanted = f"llama-cpp-python=={version()}"
        pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder))
        _run(log, *pip, "--no-binary", "llama-cpp-python", wanted)
        with tarfile.open(folder / f"{release}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    source = folder / release / "vendor" / "llama.cpp"
    made = folder / "cmake"
    if not (made / "CMakeCache.txt").is_file():
        _run(log, "cmake", "-S", str(source), "-B", str(made), *_OPTIONS)
    _run(log, "cmake", "--build", str(made), "--target", "llama-server", "-j", str(jobs))
    shutil.copy2(made / "bin" / "llama-server", target.with_suffix(".new"))
    target.with_suffix(".new").rename(target)
    shutil.rmtree(folder)
    return target


class Peer:
    """A running llama.cpp server, ready when the constructor returns."""

    def __init__(self, model: Path, *arguments: str) -> None:
        """``arguments`` are options of ``llama-server``.

        Raises:
            PeerError: It did not start.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.NamedTemporaryFile(prefix="llama-server-", suffix=".log")  # noqa: SIM115
        where = ("--host", "127.0.0.1", "--port", str(port), "--no-webui")
        self._process = subprocess.Popen(
            [str(server_path()), "--model", str(model), *where, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        end = time.monotonic() + START_SECONDS
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > end:
                self._process.kill()
                self._process.wait()
                raise PeerError(f"llama-server did not start:\n{self.log_end()}")
            time.sleep(0.05)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:  # noqa: S310
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def log_end(self) -> str:
        """The last lines it wrote."""
        text = Path(self._log.name).read_text(errors="replace")
        return "\n".join(text.splitlines()[-20:])

    def close(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


if __name__ == "__main__":
    print(build(jobs=int(os.environ.get("JOBS", "1"))))
