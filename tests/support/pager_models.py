"""Sequences and steps as naively as possible: what the pager is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

RUBBISH = -1
WAITING = ("asking", "swapped")
ROOTS = (bytes(range(32)), bytes(range(1, 33)))


class WrongContentError(AssertionError):
    """A cell does not hold what it should, or an instruction cannot be carried out."""


def check(condition: object, what: str) -> None:
    """Raise `WrongContentError` unless ``condition`` holds."""
    if not condition:
        raise WrongContentError(what)


@dataclass
class Launched:
    """A sequence's part of a step in flight."""

    epoch: int
    start: int
    valid: int


@dataclass
class Model:
    """A sequence, as naively as possible."""

    id: int
    root: bytes
    tokens: list[int]
    width: int = 1
    group: int = -1
    status: str = "asking"
    computed: int = 0
    until: int = -1
    """What lies behind is being loaded while the front is computed; -1 without end."""
    in_flight: list[Launched] = field(default_factory=list)
    kept: bool = False
    """Swapped, and no transfer has failed since."""
    blocks: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = self.width

    @property
    def length(self) -> int:
        return self.computed + sum(item.valid for item in self.in_flight)

    def known(self) -> int:
        """Tokens that are known and may be computed now."""
        end = len(self.tokens) if self.until < 0 else self.until
        return end - self.length

    def content(self, end: int) -> list[int]:
        """What the cells of positions ``0 .. end - 1`` must hold."""
        while len(self.contents) < end:
            before = self.contents[-1] if self.contents else int.from_bytes(self.root[:4], "little")
            token = self.tokens[len(self.contents)]
            self.contents.append(hash((before, token)) & 0x7FFFFFFFFFFFFFFF)
        return self.contents[:end]

    def cut(self, length: int) -> None:
        del self.tokens[length:]
        del self.contents[length:]


@dataclass
class RunSim:
    """A sequence's part of a step, as the device sees it."""

    seq: int
    start: int
    table: list[int]
    tokens: list[int]
    expected: list[int]
    """Contents of all positions up to the run's end."""
    poisoned: bool


@dataclass
class StepSim:
    epoch: int
    runs: list[RunSim]
    fails: bool
    executed: bool = False
