"""A pager with a caller that checks every invariant after every event."""

from __future__ import annotations

import numpy as np

from kvpager import (
    Admit,
    Admitted,
    Event,
    Instruction,
    Load,
    Pager,
    PagerConfig,
    PriorityClass,
    Reserve,
    Spill,
    StepLaunched,
    StepRetired,
    Store,
    Tokens,
    TransferDone,
)

ROOT, OTHER_ROOT = bytes(32), bytes(range(32))
SIZE = 4


def ids(count: int, start: int = 0) -> Tokens:
    return np.arange(start, start + count, dtype=np.int32)


class Caller:
    """A pager with a caller that checks every invariant after every event."""

    def __init__(
        self,
        gpu: int = 32,
        ram: int = 0,
        *,
        disk: int = 0,
        keep: bool = True,
        max_sequences: int = 0,
        margin: float = 0.0,
        reserve: float = 0.25,
        through: bool = False,
        persists: bool = False,
    ) -> None:
        self.pager = Pager(
            PagerConfig(
                gpu_blocks=gpu,
                ram_blocks=ram,
                disk_blocks=disk,
                disk_persists=persists,
                block_tokens=SIZE,
                max_sequences=max_sequences,
                keep_cached_on_gpu=keep,
                growth_margin=margin,
                ram_swap_reserve=reserve,
                write_through=through,
            )
        )
        self.epoch = 0
        self.transfers: list[int] = []
        """In flight, oldest first."""
        self.validate = True

    def __call__(self, event: Event) -> list[Instruction]:
        out = self.pager.handle(event)
        if self.validate:
            self.pager.validate()
        self.transfers += [item.transfer for item in out if isinstance(item, (Store, Load, Spill))]
        return out

    def settle(self) -> list[Instruction]:
        """Every transfer ends well, those that follow from that too."""
        out: list[Instruction] = []
        while self.transfers:
            out += self(TransferDone(self.transfers.pop(0)))
        return out

    def admit(self, seq: int, tokens: Tokens, root: bytes = ROOT, **more: int) -> list[Instruction]:
        klass = PriorityClass(more.pop("klass", PriorityClass.NORMAL))
        width, group, owner = more.get("width", 1), more.get("group", -1), more.get("owner", 0)
        return self(Admit(seq, tokens, root, klass, width, group, owner=owner))

    def launch(self, seq: int, count: int) -> int:
        self(Reserve((seq,), (count,)))
        epoch, self.epoch = self.epoch, self.epoch + 1
        self(StepLaunched(epoch, (seq,), (count,)))
        return epoch

    def compute(self, seq: int, tokens: Tokens) -> list[Instruction]:
        return self(StepRetired(self.launch(seq, len(tokens)), (tokens,)))

    def prompt(self, seq: int, tokens: Tokens, root: bytes = ROOT, **more: int) -> None:
        """Admit a sequence that shares nothing and compute its prompt."""
        assert self.admit(seq, tokens, root, **more) == [Admitted(seq, 0, False)]
        self.compute(seq, tokens)

    def table(self, seq: int) -> tuple[int, ...]:
        return tuple(int(block) for block in self.pager.block_table(seq))

    @property
    def free(self) -> int:
        return self.pager.stats().gpu.free
