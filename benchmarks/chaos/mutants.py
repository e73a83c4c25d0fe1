"""Part ``mutants`` of ``make chaos``: model files that are nearly right.

Each is checked as the front checks it, in this process, which nothing may disturb. What passes is
loaded in another process, as helper and engine load it.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import SafetensorError, safe_open

import pagedd
from benchmarks.chaos.damage import FolderDamage, Gguf, GgufDamage
from benchmarks.chaos.served import serve
from benchmarks.report import ROOT, Report, Row
from benchmarks.service import environment
from pagedd_daemon.models.errors import ModelError
from pagedd_daemon.models.folder import SINGLE
from pagedd_daemon.models.gguf_header import GgufHeader
from pagedd_daemon.models.model import read_model_header
from pagedd_daemon.models.safetensors_header import read_safetensors
from tests.support.tiny_model import write_tiny_model

MUTANTS = 10_000
ASKED = 40
"""Of a daemon, which starts an engine for each that passes."""
LATE_S = 1
"""By then a file is refused or loaded."""
_AHEAD = 32
"""Files that may wait to be loaded."""
_PATIENCE_S = 20.0
"""After which a process that loads is ended."""


def agrees(header: GgufHeader, path: Path) -> bool:
    """Whether gguf's own reader sees the same in a file that was accepted."""
    try:
        other: Any = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, UnicodeDecodeError):
        return True  # stricter there (enumerations of versions, texts that are not UTF-8)
    return bool(
        header.tensors == len(other.tensors)
        and header.parameters == sum(int(t.n_elements) for t in other.tensors)
        and header.header_bytes == other.data_offset
    )


def same_tensors(path: Path) -> bool:
    """Whether safetensors' own reader sees the same bytes in a file that was accepted."""
    raw = path.read_bytes()
    try:
        with safe_open(path, framework="numpy") as other:
            theirs = {name: other.get_tensor(name) for name in list(other.keys())}
    except (SafetensorError, TypeError, ValueError, OSError):
        return True  # stricter there: no holes in the data, no types that NumPy has not
    ours = read_safetensors(path).tensors
    return ours.keys() == theirs.keys() and all(
        t.shape == theirs[name].shape
        and np.ascontiguousarray(theirs[name]).tobytes() == raw[t.offset : t.offset + t.size]
        for name, t in ours.items()
    )


class Loader:
    """A process that loads what it is told to, and another one once that has died."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._process: subprocess.Popen[str] | None = None

    def load(self, path: Path) -> tuple[str, float, str]:
        """``loaded``, ``refused``, ``wrong``, ``died`` or ``late``; seconds; and what was said."""
        process = self._process or self._start()
        assert process.stdin is not None
        begin = time.monotonic()
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        line = self._line(process)
        took = time.monotonic() - begin
        if line:
            verdict, seconds, *said = line.rstrip("\n").split(" ", 2)
            return verdict, float(seconds), " ".join(said)
        self.close()
        if took >= _PATIENCE_S:
            return "late", took, "still loading"
        return "died", took, f"exit status {process.returncode}"

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.chaos.loader", self._kind],
            cwd=ROOT,
            env={**environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._line(self._process, 120.0) == "ready\n"
        return self._process

    @staticmethod
    def _line(process: subprocess.Popen[str], patience_s: float = _PATIENCE_S) -> str:
        """The next line; nothing where none comes in time, or the process has ended."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], patience_s)
        return process.stdout.readline() if ready else ""

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            try:
                self._process.wait(1.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


@dataclass
class Outcome:
    """What a run came to."""

    mutants: int = 0
    refused: int = 0
    """By the check of headers."""
    passed: Counter[str] = field(default_factory=Counter)
    """What became of the rest, by loader and verdict."""
    wrong: list[str] = field(default_factory=list)
    """Uncaught exceptions, and files that were read otherwise than they are."""
    longest_s: float = 0.0
    """Of a check in the front."""
    longest_load_s: float = 0.0
    """Of a refusal or load in another process."""
    deaths: list[str] = field(default_factory=list)
    """What killed a process that loads."""


class Mutants:
    """Damaged files of one seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self._dice = random.Random(seed)
        self._root = folder
        self._good = write_tiny_model(folder / "good.gguf")
        self._gguf = GgufDamage(Gguf.read(self._good), self._dice)
        self._folder = FolderDamage(self._dice)
        self._loaders = {kind: Loader(kind) for kind in ("helper", "llama", "torch")}
        # They wait, while the next files are made and checked; helper and engine for each other.
        self._threads = {kind: ThreadPoolExecutor(1) for kind in ("llama", "torch")}
        self._turns = {"helper": "llama", "llama": "llama", "torch": "torch"}
        self._loading: deque[tuple[Path, list[Future[None]]]] = deque()
        self.outcome = Outcome()

    def run(self, count: int) -> Outcome:
        """Make so many, check each, and load those that pass."""
        try:
            for kind, thread in self._turns.items():
                # The first load takes what a process does once.
                self._threads[thread].submit(self._loaders[kind].load, self._good)
            for at in range(count):
                self._one(at)
                self._loaded(_AHEAD)
            self._loaded(0)
        finally:
            for kind, thread in self._turns.items():
                self._threads[thread].submit(self._loaders[kind].close)
            for pool in self._threads.values():
                pool.shutdown()
        self.outcome.mutants = count
        return self.outcome

    def _one(self, at: int) -> None:
        if at % 2:
            path = self._root / f"{at}"
            path.mkdir()
            how = self._folder.next(path)
        else:
            raw, how = self._gguf.next()
            path = self._root / f"{at}.gguf"
            path.write_bytes(raw)
        name = f"mutant {at} ({how})"
        accepted = self._accepted(path, name)
        works = (self._torch,) if at % 2 else (self._llama, self._torch)
        begun = [work(path, name) for work in works if accepted]
        self._loading.append((path, begun))

    def _loaded(self, ahead: int) -> None:
        """Wait until no more than ``ahead`` files are left to be loaded, and delete the others."""
        while len(self._loading) > ahead:
            path, begun = self._loading.popleft()
            for load in begun:
                load.result()
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _accepted(self, path: Path, name: str) -> bool:
        """As the front does before anybody opens the file."""
        outcome, begin = self.outcome, time.perf_counter()
        try:
            header = read_model_header(path)
        except ModelError:
            outcome.refused += 1
            return False
        except Exception as error:
            outcome.wrong.append(f"{name}: {error!r}")
            return False
        finally:
            outcome.longest_s = max(outcome.longest_s, time.perf_counter() - begin)
        if isinstance(header, GgufHeader):
            same = agrees(header, path)
        else:
            same = same_tensors(path / SINGLE)
        if not same:
            outcome.wrong.append(f"{name}: read otherwise than it is")
        return same

    def _torch(self, path: Path, name: str) -> Future[None]:
        def work() -> None:
            self._load("torch", path, name)

        return self._threads["torch"].submit(work)

    def _llama(self, path: Path, name: str) -> Future[None]:
        """The engine gets what a helper could open, as in the daemon: who kills the helper is
        refused by that."""

        def work() -> None:
            if self._load("helper", path, name) == "loaded":
                self._load("llama", path, name)

        return self._threads["llama"].submit(work)

    def _load(self, kind: str, path: Path, name: str) -> str:
        outcome = self.outcome
        verdict, took, said = self._loaders[kind].load(path)
        outcome.passed[f"{kind} {verdict}"] += 1
        if verdict == "died" and kind != "helper":
            outcome.deaths.append(f"{name}: {kind} {said}")
        else:
            outcome.longest_load_s = max(outcome.longest_load_s, took)
        if verdict in ("wrong", "late"):
            outcome.wrong.append(f"{name}: {kind} {said}")
        return verdict


def loads(seed: int, count: int) -> tuple[int, float, bool]:
    """A daemon of its own is asked to load ``count`` mutants: how many it loaded, the longest it
    took to answer, and whether it is alive at the end, with a model that it computes."""
    loaded, longest = 0, 0.0
    with tempfile.TemporaryDirectory(prefix="pagedd-mutants-") as name:
        folder = Path(name)
        good = write_tiny_model(folder / "good.gguf")
        damage = GgufDamage(Gguf.read(good), random.Random(seed))
        with serve(str(good), "llama.cpp", "--kv-tokens", "1024") as daemon:
            front = daemon.processes()[0]
            for at in range(count):
                path = folder / f"{at}.gguf"
                path.write_bytes(damage.next()[0])
                begin = time.monotonic()
                try:
                    daemon.client.load(str(path), timeout=_PATIENCE_S)
                    loaded += 1
                except pagedd.PageddError as error:
                    if error.code == "E_INTERNAL":
                        raise
                longest = max(longest, time.monotonic() - begin)
            text = daemon.client.generate("a", model=str(good), max_tokens=8, ignore_eos=True)
            alive = text.wait().usage.generated_tokens == 8 and front.is_running()
    return loaded, longest, alive


def part(report: Report, seed: int) -> None:
    """Rows of all of them."""
    count = 300 if report.quick else MUTANTS
    print(f"mutants: {count:,} of seed {seed}")
    outcome = examine(seed, count)
    for told in (*outcome.wrong[:10], *outcome.deaths[:10]):
        print(told)
    note = f"{count:,} of seed {seed}: {outcome.refused:,} refused by their headers; of the rest "
    note += ", ".join(f"{kind} {n:,}" for kind, n in sorted(outcome.passed.items()))
    what = "mutants: uncaught exceptions, late answers, files read otherwise than they are"
    report.add(Row(what, len(outcome.wrong), "", "== 0", note))
    report.add(
        Row("mutants: longest check of a file in the front", outcome.longest_s, "s", f"<= {LATE_S}")
    )
    what = "mutants: longest refusal or load of those that passed"
    report.add(Row(what, outcome.longest_load_s, "s", f"<= {LATE_S}", "in another process"))
    what = "mutants: engines killed by a file that had passed"
    note = "a helper that dies is how its limits refuse: `E_MODEL`"
    report.add(Row(what, len(outcome.deaths), "", "== 0", note))
    asked = 10 if report.quick else ASKED
    loaded, longest, alive = loads(seed + 1, asked)
    note = f"{asked} that `pagedd load` named, {loaded} were loaded; the slowest answer took "
    note += f"{longest:.2f} s, the start of an engine included"
    what = "mutants: daemons that died of them, or compute no good model any more"
    report.add(Row(what, not alive, "", "== 0", note))


def examine(seed: int, count: int) -> Outcome:
    """``count`` mutants of ``seed``."""
    with tempfile.TemporaryDirectory(prefix="pagedd-mutants-") as folder:
        return Mutants(seed, Path(folder)).run(count)
