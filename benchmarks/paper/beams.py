"""Recorded beam searches, replayed as forks and frees on the real pager."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.paper.model import BLOCK_TOKENS, POOL_SLOTS
from benchmarks.paper.simulate import Mean, saving
from benchmarks.paper.workload import VOCABULARY, Lengths
from kvpager import Pager
from kvpager.types import (
    Admit,
    Admitted,
    Fork,
    Free,
    PagerConfig,
    Reserve,
    Reserved,
    StepLaunched,
    StepRetired,
    Tokens,
)

BEAMS = Path(__file__).with_name("beams.json")
_LOOK_EVERY = 4


@dataclass(frozen=True, slots=True)
class Recording:
    """One search: for each step, which beam each of the ``width`` beams continues."""

    width: int
    parents: tuple[tuple[int, ...], ...]

    def steps(self, count: int) -> Iterator[tuple[int, ...]]:
        """The first ``count`` steps. Past the recording its second half is repeated."""
        recorded = len(self.parents)
        half = recorded // 2
        for step in range(count):
            yield self.parents[
                step if step < recorded else half + (step - half) % (recorded - half)
            ]


def recordings(shape: str, width: int) -> list[Recording]:
    """The committed searches of a shape and width (see `record_beams`)."""
    runs = json.loads(BEAMS.read_text(encoding="utf-8"))["runs"]
    return [
        Recording(width, tuple(_split(run["parents"], width)))
        for run in runs
        if run["shape"] == shape and run["width"] == width
    ]


def _split(digits: str, width: int) -> Iterator[tuple[int, ...]]:
    for at in range(0, len(digits), width):
        yield tuple(int(digit) for digit in digits[at : at + width])


class Replay:
    """Replays searches one after the other on one pager.

    Requests share nothing with each other, so what sharing saves over many is what it saves in
    each, weighted by its blocks and its steps.
    """

    def __init__(self) -> None:
        self.pager = Pager(PagerConfig(gpu_blocks=POOL_SLOTS // BLOCK_TOKENS))
        self.saved = Mean()
        """Share of blocks saved, each step of each request weighted by its blocks."""
        self._next = 0
        self._epoch = 0
        self._noise = np.random.default_rng(5).integers(0, VOCABULARY, 1 << 16, dtype=np.int32)

    def run(self, prompt_tokens: int, output_tokens: int, recording: Recording) -> None:
        """One request: compute the prompt, then one token per beam and step.

        After every step the beams that nobody continues are freed, and those that several
        continue are forked.
        """
        pager = self.pager
        steps = recording.steps(output_tokens)
        next(steps)
        [first] = self._ids(1)
        at = first * 769 % (len(self._noise) // 2)
        prompt = self._noise[at : at + prompt_tokens]
        verdicts = pager.handle(Admit(first, prompt, bytes(32), width=recording.width))
        assert any(isinstance(v, Admitted) and v.computed == 0 for v in verdicts)
        self._step([first], [prompt])
        children = self._ids(recording.width - 1)
        pager.handle(Fork(first, tuple(children)))
        beams = [first, *children]
        for number, parents in enumerate(steps, start=1):
            tokens = [self._noise[b * 31 + number & 0xFFF :][:1] for b in beams]
            self._step(beams, tokens)
            beams = self._follow(beams, parents)
            if number % _LOOK_EVERY == 0:
                tables = [pager.block_table(beam) for beam in beams]
                self.saved.add(saving(tables), sum(map(len, tables)))
        for beam in beams:
            pager.handle(Free(beam, cache=False))

    def _follow(self, beams: Sequence[int], parents: Sequence[int]) -> list[int]:
        children: dict[int, list[int]] = {}
        following: list[int] = []
        for parent in parents:
            mine = children.setdefault(parent, [])
            # The first child goes on as its parent; only the others are new sequences.
            mine.append(beams[parent] if not mine else self._ids(1)[0])
            following.append(mine[-1])
        for beam, sequence in enumerate(beams):
            if beam not in children:
                self.pager.handle(Free(sequence, cache=False))
        for parent, made in children.items():
            if len(made) > 1:
                self.pager.handle(Fork(beams[parent], tuple(made[1:])))
        return following

    def _step(self, seqs: Sequence[int], tokens: Sequence[Tokens]) -> None:
        counts = tuple(len(t) for t in tokens)
        verdicts = self.pager.handle(Reserve(tuple(seqs), counts))
        assert verdicts[-1] == Reserved(()), "one request fits the pool"
        self._epoch += 1
        self.pager.handle(StepLaunched(self._epoch, tuple(seqs), counts))
        self.pager.handle(StepRetired(self._epoch, tuple(tokens)))

    def _ids(self, count: int) -> list[int]:
        self._next += count
        return list(range(self._next - count, self._next))


def beam_saving(shape: str, width: int, pairs: Lengths) -> float:
    """Share of blocks that sharing saves over requests of these lengths."""
    searches = recordings(shape, width)
    replay = Replay()
    for number, (prompt, output) in enumerate(pairs):
        replay.run(prompt, output, searches[number % len(searches)])
    replay.pager.validate()
    assert replay.pager.stats().gpu.used == 0
    return replay.saved.value
