"""The protocol between the engine and whatever computes: three implementations, one contract.

The step loop calls a backend from one thread, in this order per step::

    backend.apply(instructions)         # what the pager asked for, in the pager's order
    handle = backend.launch(step)       # may return before the work is done
    result = backend.collect(handle)    # blocks until it is
    for transfer in backend.poll_transfers(): ...

A backend whose ``launch`` returns early takes a second step before the first is collected. The
tokens that the first will draw are not known by then: the second names them as `PENDING`. Once the
first is collected and its tokens are accepted, ``backend.draw(handle)`` of the second draws what a
grammar kept from being drawn before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvpager.types import Adopt, Instruction, PageName, Spill, Store, Tokens
from pagedd_daemon.engine.sampler import Drawn, Sampler

PENDING = -1
"""In `Run.tokens`: the token that the step before draws for this sequence. Only in a run of one
token, only where that step is still in flight, and only if its run of this sequence has exactly one
`Draw`, of this sequence."""


SCORED_ROWS = 64
"""`Run.follows` of a step at most, over all its runs: 12 MB of logits with a vocabulary of 49,152,
32 MB with one of 128,256."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the scheduler must know of a backend to plan with it."""

    name: str
    """``simulated``, ``llama.cpp``, ``torch``."""
    device: str
    """For people: ``CPU (2 threads)``, ``NVIDIA H200``."""
    model_digest: bytes
    """32 bytes that name the weights: part of every prefix root."""
    kv_dtype: str
    """``f16``, ``f32``, …; part of every prefix root too."""
    vocab_size: int
    context_tokens: int
    """The longest sequence the model serves, in tokens."""
    eog_tokens: frozenset[int]
    """Ids that end a generation."""
    gpu_blocks: int
    """Blocks of the first tier the backend has room for."""
    ram_blocks: int
    """Pages the RAM tier has room for."""
    block_tokens: int
    block_bytes: int
    """Bytes of KV per block."""
    max_sequences: int
    """Sequences that can hold KV at the same time; 0 for any number."""
    max_step_tokens: int
    """Input tokens a step may have at most."""
    asynchronous: bool
    """Whether ``launch`` returns before the work is done, so that the engine can talk meanwhile and
    launch a second step, which may name tokens of the first as `PENDING`."""
    keep_cached_on_gpu: bool
    """See `kvpager.types.PagerConfig.keep_cached_on_gpu`."""
    disk_blocks: int = 0
    """Pages the disk tier has room for."""
    disk_persists: bool = False
    """Whether the disk tier outlives the engine."""
    constrains: bool = False
    """Whether its draws keep to the grammars of samplers (`pagedd_daemon.engine.grammar`)."""
    notice: str = ""
    """What people must know of how it computes: that it does not use the GPU they expect."""


@dataclass(slots=True)
class Draw:
    """One token to be drawn from the logits after a run's last token."""

    seq: int
    """The sequence the token is for (with n > 1, a child of the run's sequence)."""
    sampler: Sampler


@dataclass(slots=True)
class Run:
    """Consecutive tokens of one sequence in one step."""

    seq: int
    start: int
    """Position of the first token."""
    tokens: Tokens
    """Input ids, int32, shape ``(n,)``, n >= 1; one of them may be `PENDING`."""
    block_table: npt.NDArray[np.int32]
    """Blocks of the sequence up to and with these tokens; a view, valid until the next event."""
    draws: Sequence[Draw] = ()
    """Empty while a prompt is not yet wholly computed."""
    follows: Tokens | None = None
    """What follows its first, second, … token in the prompt, int32, shape ``(m,)``, m <= n: the
    log-probabilities of these are wanted (`StepResult.scored`). At most `SCORED_ROWS` in a step,
    since each takes a row of logits, which for a whole prompt would be gigabytes."""
    top: int = 0
    """Then: how many of the most likely tokens are wanted beside each."""


@dataclass(slots=True)
class Step:
    """One forward pass over the runs of many sequences.

    Where the same sequences take a token each in many steps one after the other, the same object is
    launched again, its runs moved on (`pagedd_daemon.engine.stretch`).
    """

    epoch: int
    runs: list[Run]


@dataclass(slots=True)
class StepResult:
    """What came out of a step, one `Drawn` per `Draw`, in the step's order.

    Not frozen: see `Drawn`.
    """

    epoch: int
    drawn: list[tuple[int, Drawn]]
    """``(seq, drawn)``."""
    seconds: float
    """How long the device was busy with it."""
    scored: Sequence[tuple[int, Sequence[Drawn]]] = ()
    """``(seq, a Drawn for each of Run.follows)`` of each run that has any, in the step's order;
    token -1 where the logits are not numbers."""


@dataclass(frozen=True, slots=True)
class TransferResult:
    """A `Store`, `Load` or `Spill` that has ended."""

    transfer: int
    ok: bool
    seconds: float = 0.0
    """How long the copying itself took, without waiting for its turn; 0 where it was not measured.
    The pager weighs swapping against computing again by it."""


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes the backend holds."""

    weights: int
    kv_pool: int
    ram_tier: int
    """In use by stored pages now."""


class ModelLoadError(Exception):
    """The model could not be loaded.

    Attributes:
        code: ``E_MODEL``, for the client.
        details: The figures that explain it.
    """

    def __init__(self, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = "E_MODEL"
        self.details = dict(details or {})


class StepFaultError(Exception):
    """A step could not be computed; nothing of it may be used. The engine fails its requests."""


class DeviceMemoryError(StepFaultError):
    """The device had no memory for a step, even in the smallest pieces. Nothing has changed, and
    the same sequences may be tried again: fewer at a time, or with less memory for the pool."""


class Elastic(Protocol):
    """A first tier in the memory of a device that others use too: it can give some back."""

    @property
    def total_bytes(self) -> int:
        """Bytes of the device."""
        ...

    def free_bytes(self) -> int:
        """Bytes of the device that nobody has. May be called from any thread."""
        ...

    @property
    def there(self) -> int:
        """Blocks there is memory for now: more than the pager was told of until `Shrunk`."""
        ...

    def grow(self, blocks: int) -> int:
        """Have memory for ``blocks``, before the pager is told that it may grow.

        Returns:
            Blocks there is memory for now: fewer where others use the device's memory.
        """
        ...


class Embedder(Protocol):
    """Turns texts into vectors, beside the pool: one text at a time, in pieces."""

    @property
    def dimensions(self) -> int:
        """Numbers of a vector."""
        ...

    def begin(self, tokens: int) -> None:
        """A text of so many tokens comes next.

        Raises:
            StepFaultError: There is no memory for it.
        """
        ...

    def add(self, start: int, tokens: Tokens) -> npt.NDArray[np.float64]:
        """Compute the text's next tokens, int32, shape ``(n,)``, the first at position ``start``.

        Returns:
            The sum of their last hidden states, shape ``(dimensions,)``.

        Raises:
            StepFaultError: They could not be computed.
        """
        ...

    def rest(self) -> None:
        """Nobody waits for a vector: give back what they took."""
        ...


class Handle(Protocol):
    """A step in flight; opaque."""


class Backend(Protocol):
    """Runs steps and moves pages. Not thread-safe."""

    @property
    def capabilities(self) -> Capabilities:
        """Fixed once the model is loaded."""
        ...

    @property
    def elastic(self) -> Elastic | None:
        """Its first tier, if that can change its size while it is used."""
        ...

    @property
    def embedder(self) -> Embedder | None:
        """What computes vectors of texts, where it can."""
        ...

    def apply(self, instructions: Iterable[Instruction]) -> None:
        """Carry out, in order, those of the pager's instructions that concern memory.

        `Attach`, `CopyBlock`, `Store`, `Load`, `Spill`, `Trim` and `Release`, and `Grown` and
        `Shrunk` where memory can be given back to the system while the backend lives; verdicts are
        ignored.
        """
        ...

    def launch(self, step: Step) -> Handle:
        """Start a step. At most one is in flight, two where it is `Capabilities.asynchronous`; they
        are collected in the order of their launches.

        A sampler of a second step has not yet accepted the token that the first draws for it: its
        penalties and its random number are those of one token later. Where it has a grammar, which
        must see that token before it can tell what may follow, the draws of the step are put off
        until `draw`.

        Raises:
            DeviceMemoryError: There is not enough memory for it.
        """
        ...

    def draw(self, handle: Handle) -> None:
        """Draw what `launch` has put off of the step, if anything, by the next `launch` or
        `collect`. No sampler of the step may be touched until then.

        Called where a step is in flight and the one before it was collected: its tokens have been
        accepted, or have ended their samples, whose draws in this step are of no use to anybody.
        Where there is not enough memory for it, `collect` says so, and a `launch` before that.
        """
        ...

    def collect(self, handle: Handle) -> StepResult:
        """Wait for the step.

        Raises:
            StepFaultError: The device refused it.
        """
        ...

    def poll_transfers(self) -> list[TransferResult]:
        """Transfers that ended since the last call."""
        ...

    def commit(self, transfer: Store | Spill, names: Sequence[PageName | None]) -> None:
        """A transfer that has ended well has filled slots of a lower tier with the pages ``names``,
        one for each of ``transfer.pages``; None for one that is of no use to anybody else.

        From now on they may be found by whoever comes after this backend, too.
        """
        ...

    def adoptable(self) -> list[Adopt]:
        """What lower tiers hold from before this backend. Asked for once, before anything else."""
        ...

    def memory(self) -> MemoryReport:
        """What is held now."""
        ...

    def counters(self) -> dict[str, int]:
        """Further figures for ``stats``, by name; counted since it was loaded."""
        ...

    def troubles(self) -> list[str]:
        """What does not work, or not as it was configured, now: sentences for people."""
        ...

    def close(self) -> None:
        """Give everything back. Idempotent."""
        ...
