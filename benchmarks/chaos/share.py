"""How much of the step thread's time goes into writing through, told by a clock around it.

Two daemons in turns tell a difference of some percent at best on a machine that others use too;
this tells it to a hundredth, and leaves out only what the caches lose by it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from benchmarks.chaos.streams import prompts
from kvpager.keeping import Keeping
from kvpager.types import Instruction, PageName, Spill, Store
from pagedd_daemon import messages as m
from pagedd_daemon.backends.llama import LlamaBackend
from pagedd_daemon.engine.core import Engine

TOKENS = 260


class Clocked(LlamaBackend):
    """Counts the time of stores that no sequence asked for."""

    spent_s = 0.0
    written = 0
    """Pages of these."""

    def apply(self, instructions: Iterable[Instruction]) -> None:
        """See `Backend`."""
        for instruction in instructions:
            begin = time.perf_counter()
            super().apply((instruction,))
            if isinstance(instruction, Store) and instruction.through:
                self.spent_s += time.perf_counter() - begin
                self.written += len(instruction.pages)

    def commit(self, transfer: Store | Spill, names: Sequence[PageName | None]) -> None:
        """See `Backend`."""
        begin = time.perf_counter()
        super().commit(transfer, names)
        if isinstance(transfer, Store) and transfer.through:
            self.spent_s += time.perf_counter() - begin


def share(model: Path) -> tuple[float, float, int]:
    """Part of an engine's time, 0 to 1, that goes into writing through while eight streams decode;
    that time in all, in seconds; pages written."""
    deciding_s = 0.0
    original = Keeping.write_through

    def write_through(self: Keeping, out: list[Instruction]) -> None:
        nonlocal deciding_s
        begin = time.perf_counter()
        original(self, out)
        deciding_s += time.perf_counter() - begin

    configure = m.Configure(
        "llama.cpp", str(model), bytes(32), 2048, 16384, 1 << 30, os.cpu_count() or 1
    )
    Keeping.write_through = write_through  # type: ignore[method-assign]
    try:
        with closing(Clocked.load(configure, lambda _: None)) as backend:
            engine = Engine(backend, time.monotonic, write_through=True)
            for rid, text in enumerate(prompts(4, 40_000)):
                engine.handle(_submit(rid, text))
            begin = time.perf_counter()
            while engine.has_work:
                engine.step(lambda report: None)
            took = time.perf_counter() - begin
            assert isinstance(backend, Clocked)
            assert backend.spent_s > 0.0 < deciding_s
            return (backend.spent_s + deciding_s) / took, took, backend.written
    finally:
        Keeping.write_through = original  # type: ignore[method-assign]


def _submit(rid: int, text: list[int]) -> m.Submit:
    sampling = {"temperature": 0.0}
    stop = {"max_tokens": TOKENS, "ignore_eos": True, "stop_token_ids": ()}
    prompt = np.asarray(text, "<i4").tobytes()
    return m.Submit(rid, "chaos", 1, bytes(32), prompt, 1, sampling, stop)
