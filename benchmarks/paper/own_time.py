"""What the pager itself costs: time per step and per admission, bytes per block."""

from __future__ import annotations

import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.paper.model import BLOCK_TOKENS
from benchmarks.paper.workload import VOCABULARY
from kvpager import Pager
from kvpager.types import (
    Admit,
    Admitted,
    Free,
    Instruction,
    PagerConfig,
    Reserve,
    StepLaunched,
    StepRetired,
    Tokens,
)

_ROOT = bytes(32)
_LONGEST_PROMPT = 600


class Driver:
    """Steps a pager, and times what is spent inside it.

    In CPU time of the thread, which other programs on the machine add nothing to; the pager never
    waits for anything, so there is no other time to miss.
    """

    def __init__(self, gpu_blocks: int) -> None:
        self.pager = Pager(PagerConfig(gpu_blocks=gpu_blocks, growth_margin=0.0))
        self._random = np.random.default_rng(3)
        self._epoch = 0
        self._seq = 0

    def admit(self, tokens: Tokens) -> tuple[int, float]:
        """Admit a new sequence; its id, and the seconds that took."""
        self._seq += 1
        event = Admit(self._seq, tokens, _ROOT)
        verdicts, seconds = _timed(lambda: self.pager.handle(event))
        assert any(isinstance(v, Admitted) for v in verdicts)
        return self._seq, seconds

    def step(self, seqs: tuple[int, ...], tokens: tuple[Tokens, ...]) -> float:
        """Reserve, launch and retire a step; seconds inside the pager."""
        counts = tuple(len(t) for t in tokens)
        self._epoch += 1
        reserve = Reserve(seqs, counts)
        launched = StepLaunched(self._epoch, seqs, counts)
        retired = StepRetired(self._epoch, tokens)
        handle = self.pager.handle
        start = time.thread_time()
        handle(reserve)
        handle(launched)
        handle(retired)
        return time.thread_time() - start

    def prompt(self, tokens: int) -> Tokens:
        """Random ids."""
        return self._random.integers(0, VOCABULARY, tokens, dtype=np.int32)

    def run_prompt(self, prompt: Tokens) -> int:
        """Admit a sequence and compute its prompt."""
        seq, _ = self.admit(prompt)
        self.step((seq,), (prompt,))
        return seq


def _timed(call: Callable[[], list[Instruction]]) -> tuple[list[Instruction], float]:
    start = time.thread_time()
    result = call()
    return result, time.thread_time() - start


def decode_step(batch: int, steps: int) -> list[float]:
    """Seconds in the pager for each of ``steps`` decode steps of ``batch`` sequences.

    Prompts are of 1 to 600 tokens, so in every step one in `BLOCK_TOKENS` sequences needs a block.
    """
    driver = Driver(gpu_blocks=batch * (_LONGEST_PROMPT + steps) // BLOCK_TOKENS + 2 * batch)
    spread = np.random.default_rng(4).integers(1, _LONGEST_PROMPT, batch).tolist()
    seqs = tuple(driver.run_prompt(driver.prompt(length)) for length in spread)
    drawn = driver.prompt(batch * steps)
    times = []
    gc.collect()
    gc.disable()
    try:
        for step in range(steps):
            tokens = tuple(drawn[step * batch + i :][:1] for i in range(batch))
            times.append(driver.step(seqs, tokens))
    finally:
        gc.enable()
    return times


@dataclass(frozen=True, slots=True)
class Growth:
    """Median seconds of a decode step by batch, in the quietest round."""

    medians: dict[int, float]

    @property
    def exponent(self) -> float:
        """The slope of log time over log batch (least squares): 1 is linear."""
        batches = np.log(list(self.medians))
        return float(np.polyfit(batches, np.log(list(self.medians.values())), 1)[0])


def growth(batches: tuple[int, ...], steps: int) -> Growth:
    """Decode steps of each batch size, the batches taking turns so that noise hits all alike.

    Of five rounds the one with the lowest median counts: whatever else runs on the machine empties
    the caches and only ever adds.
    """
    medians: dict[int, list[float]] = {batch: [] for batch in batches}
    for _ in range(5):
        for batch in batches:
            medians[batch].append(statistics.median(decode_step(batch, steps)))
    return Growth({batch: min(rounds) for batch, rounds in medians.items()})


def long_admission(tokens: int, times: int) -> list[float]:
    """Seconds to admit a prompt of ``tokens`` whose pages are all cached, ``times`` times over."""
    driver = Driver(gpu_blocks=2 * tokens // BLOCK_TOKENS)
    prompt = driver.prompt(tokens)
    driver.pager.handle(Free(driver.run_prompt(prompt)))
    taken = []
    for _ in range(times):
        seq, seconds = driver.admit(prompt)
        assert driver.pager.computed(seq) >= tokens - BLOCK_TOKENS, "not a full hit"
        taken.append(seconds)
        driver.pager.handle(Free(seq))
    return taken


@dataclass(frozen=True, slots=True)
class Bookkeeping:
    """What a pager with every block in use costs, per block."""

    bytes_per_block: float
    objects_per_block: float


def bookkeeping(blocks: int) -> Bookkeeping:
    """Memory of a pager whose blocks are all cached pages in the prefix index.

    Measured by `tracemalloc` from before the pager is made, so hash tables, free lists and
    whatever the interpreter adds are counted; objects are live allocations.
    """
    random = np.random.default_rng(6)
    prompt_blocks = 500
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.take_snapshot()
    driver = Driver(blocks)
    for _ in range(blocks // prompt_blocks):
        size = prompt_blocks * BLOCK_TOKENS
        prompt = random.integers(0, VOCABULARY, size, dtype=np.int32)
        driver.pager.handle(Free(driver.run_prompt(prompt)))
    assert driver.pager.stats().gpu.cached >= blocks - prompt_blocks
    del prompt
    gc.collect()
    after = tracemalloc.take_snapshot()
    tracemalloc.stop()
    grown = after.compare_to(before, "filename")
    return Bookkeeping(
        sum(entry.size_diff for entry in grown) / blocks,
        sum(entry.count_diff for entry in grown) / blocks,
    )
