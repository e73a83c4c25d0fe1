"""A pager and a backend in step: what the scheduler does, reduced to one line per step."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from kvpager.types import (
    Admit,
    Admitted,
    Deferred,
    Event,
    Fork,
    Free,
    Instruction,
    Preempt,
    Preempted,
    PreemptMode,
    Reserve,
    Reserved,
    Resume,
    Runnable,
    StepFailed,
    StepLaunched,
    StepRetired,
    Truncate,
)
from pagedd_daemon.backends.base import Backend, Draw, Run, Step, StepFaultError
from pagedd_daemon.engine.pool import Pool
from pagedd_daemon.engine.sampler import Sampler
from tests.support.steps import greedy, ids

ROOT = bytes(32)

Judge = Callable[[list[int]], npt.NDArray[np.bool_]]
"""Of a text, whether each token is one that a plain run would have drawn there."""


class Driver:
    """A pager and a backend kept in step, with the books of every sequence's tokens."""

    def __init__(self, backend: Backend, *, validate: bool = True) -> None:
        """``validate``: check the pager's invariants after every event (slow with many pages)."""
        self._validate = validate
        self.backend = backend
        self._pool = Pool(backend)
        self.pager = self._pool.pager
        self.texts: dict[int, list[int]] = {}
        """All tokens of each sequence."""
        self.computed: dict[int, int] = {}
        """How many of them are in the pool."""
        self.until: dict[int, int] = {}
        """Up to where it may compute while its back is being loaded; -1: as far as it likes."""
        self.samplers: dict[int, Sampler] = {}
        self.drawn_at: dict[int, list[int]] = {}
        """Which of the tokens were drawn."""
        self.swapped: set[int] = set()
        self._epoch = 0

    def handle(self, event: Event) -> list[Instruction]:
        """One event, and every transfer that follows from it."""
        out = self._pool.handle(event)
        while self._pool.transfers_in_flight:
            out = out + self._pool.settle()
        if self._validate:
            self.pager.validate()
        for answer in out:
            if isinstance(answer, (Admitted, Runnable)):
                self.computed[answer.seq] = answer.computed
                self.until[answer.seq] = answer.until
                self.swapped.discard(answer.seq)
            elif isinstance(answer, Preempted):
                self.swapped.add(answer.seq)
        return out

    def admit(
        self, seq: int, prompt: Sequence[int], sampler: Sampler | None = None, owner: int = 0
    ) -> int | None:
        """Admit a sequence; returns its cached tokens, or None if it must wait."""
        answers = self.handle(Admit(seq, ids(prompt), ROOT, owner=owner))
        if any(isinstance(answer, Deferred) for answer in answers):
            return None
        self._begin(seq, prompt, sampler)
        return self.computed[seq]

    def _begin(self, seq: int, text: Sequence[int], sampler: Sampler | None = None) -> None:
        self.samplers[seq] = sampler or greedy(self.backend.capabilities.vocab_size)
        self.texts[seq] = list(text)
        self.drawn_at[seq] = []

    def fork(self, parent: int, children: dict[int, int]) -> None:
        """Children of all that is computed of ``parent``, each with a next token of its own."""
        self.handle(Fork(parent, tuple(children)))
        for child, token in children.items():
            self._begin(child, [*self.texts[parent][: self.computed[parent]], token])
            self.computed[child] = self.computed[parent]

    def truncate(self, seq: int, length: int, token: int) -> None:
        """Keep ``length`` tokens and continue with another one."""
        self.handle(Truncate(seq, length))
        self.texts[seq] = [*self.texts[seq][:length], token]
        self.computed[seq] = length
        self.drawn_at[seq] = [at for at in self.drawn_at[seq] if at < length]

    def preempt(self, seq: int, mode: PreemptMode = PreemptMode.SWAP) -> None:
        """Take a sequence out."""
        self.handle(Preempt(seq, mode))

    def resume(self, seq: int) -> bool:
        """Bring it back; whether there was room."""
        self.handle(Resume(seq))
        return seq not in self.swapped

    def free(self, seq: int) -> list[int]:
        """End a sequence; returns its text."""
        self.handle(Free(seq))
        self.swapped.discard(seq)
        del self.computed[seq], self.samplers[seq], self.drawn_at[seq]
        return self.texts.pop(seq)

    def missing(self, seq: int) -> int:
        """Tokens of a text that are not computed yet."""
        return len(self.texts[seq]) - self.computed[seq]

    def step(self, counts: dict[int, int]) -> set[int]:
        """Compute ``counts[seq]`` tokens of each; draw where that reaches the end of the text.

        Returns:
            Sequences for which there was no room.

        Raises:
            StepFaultError: The backend's; the pager knows.
        """
        seqs, amounts = tuple(counts), tuple(counts.values())
        (answer,) = [a for a in self.handle(Reserve(seqs, amounts)) if isinstance(a, Reserved)]
        short = {shortage.seq for shortage in answer.short}
        counts = {seq: count for seq, count in counts.items() if seq not in short}
        if not counts:
            return short
        seqs, amounts = tuple(counts), tuple(counts.values())
        self._epoch += 1
        self.backend.apply(self.pager.handle(StepLaunched(self._epoch, seqs, amounts)))
        runs = [self._run(seq, count) for seq, count in counts.items()]
        try:
            result = self.backend.collect(self.backend.launch(Step(self._epoch, runs)))
        except StepFaultError:
            self.handle(StepFailed(self._epoch))
            raise
        assert result.epoch == self._epoch
        self.handle(StepRetired(self._epoch, tuple(run.tokens for run in runs)))
        for seq in counts:
            # Further than the step where what comes next has been loaded meanwhile.
            self.computed[seq] = self.pager.computed(seq)
        for seq, drawn in result.drawn:
            self.drawn_at[seq].append(len(self.texts[seq]))
            self.texts[seq].append(drawn.token)
            self.samplers[seq].accept(drawn.token)
        return short

    def _run(self, seq: int, count: int) -> Run:
        start = self.computed[seq]
        tokens = ids(self.texts[seq][start : start + count])
        assert len(tokens) == count > 0
        ends = count == self.missing(seq)
        draws = [Draw(seq, self.samplers[seq])] if ends else []
        return Run(seq, start, tokens, self.pager.block_table(seq), draws)

    def prefill(self, *seqs: int, chunk: int = 10**6) -> None:
        """Compute what is missing of the texts, ``chunk`` tokens at a time, and draw once."""
        for seq in seqs:
            while missing := self.missing(seq):
                until = self.until.get(seq, -1)
                granted = until - self.computed[seq] if until >= 0 else missing
                count = min(chunk, missing, granted)
                assert not self.step({seq: count})
                if count == missing:
                    break

    def generate(self, seqs: Sequence[int], steps: int) -> None:
        """Decode ``steps`` tokens of each sequence, all in one batch."""
        for _ in range(steps):
            assert not self.step({seq: self.missing(seq) for seq in seqs})

    def check(self, seq: int, judge: Judge) -> None:
        """Whether everything drawn for ``seq`` is what a plain run would have drawn."""
        good = judge(self.texts[seq])
        wrong = [at for at in self.drawn_at[seq] if not good[at]]
        assert not wrong, (seq, wrong, self.texts[seq], self.pager.story(seq))


class Scenario:
    """Random events on a small pool: sharing, forking, swapping, truncating, in any order."""

    def __init__(self, driver: Driver, judge: Judge, seed: int) -> None:
        self.driver = driver
        self.judge = judge
        self.dice = random.Random(seed)
        self._vocab = min(driver.backend.capabilities.vocab_size, 250)
        self._next = 0
        self._stems = [self._random(length) for length in (40, 75, 100)]
        self.done: dict[str, int] = {}
        """How often each kind of event took place."""

    def _random(self, length: int) -> list[int]:
        return [self.dice.randrange(3, self._vocab) for _ in range(length)]

    def play(self, events: int) -> None:
        """That many events, then everybody is judged and ends."""
        kinds = [
            (self._admit, 4),
            (self._step, 30),
            (self._fork, 3),
            (self._preempt, 3),
            (self._resume, 5),
            (self._truncate, 2),
            (self._end, 3),
        ]
        chosen = self.dice.choices([k for k, _ in kinds], [w for _, w in kinds], k=events)
        for kind in chosen:
            if kind():
                name = kind.__name__
                self.done[name] = self.done.get(name, 0) + 1
        for seq in list(self.driver.texts):
            self._judge_and_free(seq)

    def _running(self) -> list[int]:
        return [seq for seq in self.driver.texts if seq not in self.driver.swapped]

    def _id(self) -> int:
        self._next += 1
        return self._next

    def _admit(self) -> bool:
        stem = self.dice.choice(self._stems)
        prompt = stem[: self.dice.randint(1, len(stem))] + self._random(self.dice.randint(0, 30))
        return len(self.driver.texts) < 14 and self.driver.admit(self._id(), prompt) is not None

    def _step(self) -> bool:
        running = self._running()
        chosen = self.dice.sample(running, min(len(running), self.dice.randint(1, 8)))
        counts = {}
        for seq in chosen:
            missing = self.driver.missing(seq)
            counts[seq] = missing if missing == 1 else self.dice.randint(1, missing)
        if counts and self.driver.step(counts):
            victim = self.pick(self._running())
            self.driver.preempt(victim, self.dice.choice(list(PreemptMode)))
        return bool(counts)

    def pick(self, seqs: list[int]) -> int:
        """One of them."""
        return self.dice.choice(sorted(seqs))

    def _fork(self) -> bool:
        ready = [seq for seq in self._running() if self.driver.computed[seq]]
        if not ready or len(self.driver.texts) > 10:
            return False
        tokens = self._random(self.dice.randint(1, 3))
        self.driver.fork(self.pick(ready), {self._id(): token for token in tokens})
        return True

    def _preempt(self) -> bool:
        running = self._running()
        if running:
            self.driver.preempt(self.pick(running), self.dice.choice(list(PreemptMode)))
        return bool(running)

    def _resume(self) -> bool:
        return bool(self.driver.swapped) and self.driver.resume(
            self.pick(list(self.driver.swapped))
        )

    def _truncate(self) -> bool:
        able = [seq for seq in self._running() if self.driver.computed[seq] > 1]
        if not able:
            return False
        seq = self.pick(able)
        self.driver.check(seq, self.judge)
        length = self.dice.randint(1, self.driver.computed[seq])
        self.driver.truncate(seq, length, self._random(1)[0])
        return True

    def _end(self) -> bool:
        if not self.driver.texts:
            return False
        self._judge_and_free(self.pick(list(self.driver.texts)))
        return True

    def _judge_and_free(self, seq: int) -> None:
        self.driver.check(seq, self.judge)
        self.driver.free(seq)
