"""A pager and a backend in step: what the scheduler does, reduced to one line per step."""

from __future__ import annotations

from collections.abc import Sequence

from kvpager import Pager
from kvpager.types import (
    Admit,
    Admitted,
    Event,
    Instruction,
    Reserve,
    Reserved,
    StepFailed,
    StepLaunched,
    StepRetired,
    TransferDone,
    TransferFailed,
)
from pagedd_daemon.backends.base import Backend, Draw, Run, Step, StepFaultError
from pagedd_daemon.engine.sampler import Drawn, Sampler
from tests.support.steps import greedy, ids

ROOT = bytes(32)


class Driver:
    """A pager and a backend kept in step, with the books of every sequence's tokens."""

    def __init__(self, backend: Backend, pager: Pager) -> None:
        self.backend = backend
        self.pager = pager
        self.texts: dict[int, list[int]] = {}
        """All tokens of each sequence."""
        self.computed: dict[int, int] = {}
        """How many of them are in the pool."""
        self.samplers: dict[int, Sampler] = {}
        self.drawn: dict[int, list[Drawn]] = {}
        self.epoch = 0

    def handle(self, event: Event) -> list[Instruction]:
        """One event, and every transfer that follows from it."""
        out = self.pager.handle(event)
        self.backend.apply(out)
        while ended := self.backend.poll_transfers():
            for result in ended:
                kind = TransferDone if result.ok else TransferFailed
                more = self.pager.handle(kind(result.transfer))
                self.backend.apply(more)
                out = out + more
        self.pager.validate()
        return out

    def admit(self, seq: int, prompt: Sequence[int], sampler: Sampler | None = None) -> int:
        """Admit a sequence that must be let in at once; returns its cached tokens."""
        self.samplers[seq] = sampler or greedy(self.backend.capabilities.vocab_size)
        self.texts[seq] = list(prompt)
        self.drawn[seq] = []
        answers = self.handle(Admit(seq, ids(prompt), ROOT))
        (answer,) = [a for a in answers if isinstance(a, Admitted)]
        self.computed[seq] = answer.computed
        return answer.computed

    def step(self, counts: dict[int, int]) -> None:
        """Compute ``counts[seq]`` tokens of each; draw where that reaches the end of the text.

        Raises:
            StepFaultError: The backend's; the pager knows.
        """
        seqs, amounts = tuple(counts), tuple(counts.values())
        (answer,) = [a for a in self.handle(Reserve(seqs, amounts)) if isinstance(a, Reserved)]
        assert not answer.short
        self.epoch += 1
        self.backend.apply(self.pager.handle(StepLaunched(self.epoch, seqs, amounts)))
        runs = []
        for seq, count in counts.items():
            start = self.computed[seq]
            tokens = ids(self.texts[seq][start : start + count])
            assert len(tokens) == count
            ends = start + count == len(self.texts[seq])
            draws = [Draw(seq, self.samplers[seq])] if ends else []
            runs.append(Run(seq, start, tokens, self.pager.block_table(seq), draws))
        try:
            result = self.backend.collect(self.backend.launch(Step(self.epoch, runs)))
        except StepFaultError:
            self.handle(StepFailed(self.epoch))
            raise
        assert result.epoch == self.epoch
        self.handle(StepRetired(self.epoch, tuple(run.tokens for run in runs)))
        for seq, count in counts.items():
            self.computed[seq] += count
        for seq, drawn in result.drawn:
            self.drawn[seq].append(drawn)
            self.texts[seq].append(drawn.token)
            self.samplers[seq].accept(drawn.token)

    def prefill(self, seq: int, chunk: int = 10**6) -> None:
        """Compute what is missing of a text, ``chunk`` tokens at a time, and draw."""
        while missing := len(self.texts[seq]) - self.computed[seq]:
            done = len(self.drawn[seq])
            self.step({seq: min(chunk, missing)})
            if len(self.drawn[seq]) > done:
                return

    def generate(self, seqs: Sequence[int], steps: int) -> None:
        """Decode ``steps`` tokens of each sequence, all in one batch."""
        for _ in range(steps):
            self.step({seq: len(self.texts[seq]) - self.computed[seq] for seq in seqs})
