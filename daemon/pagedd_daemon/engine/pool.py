"""Where the pager's instructions meet the backend's memory."""

from __future__ import annotations

from dataclasses import dataclass

from kvpager import Pager
from kvpager.types import (
    Event,
    Instruction,
    Load,
    PagerConfig,
    Spill,
    Store,
    Tier,
    TransferDone,
    TransferFailed,
)
from pagedd_daemon.backends.base import Backend

_LEAST_OBSERVED = 128
"""Tokens that a rate is taken over: what a small transfer takes says little of a large one."""


@dataclass(slots=True)
class _Copied:
    """Transfers of one kind since its rate was last taken."""

    tokens: int = 0
    seconds: float = 0.0


class Pool:
    """The pager and the backend that carries out what it says, kept in step."""

    def __init__(
        self, backend: Backend, pager: Pager | None = None, *, write_through: bool = False
    ) -> None:
        """A pool over ``backend``'s memory, empty.

        Args:
            backend: Carries out what the pager says.
            pager: Another than one of the backend's capabilities (the paper's baselines).
        """
        caps = backend.capabilities
        self.pager = pager or Pager(
            PagerConfig(
                gpu_blocks=caps.gpu_blocks,
                ram_blocks=caps.ram_blocks,
                disk_blocks=caps.disk_blocks,
                disk_persists=caps.disk_persists,
                block_tokens=caps.block_tokens,
                max_sequences=caps.max_sequences,
                keep_cached_on_gpu=caps.keep_cached_on_gpu,
                write_through=write_through,
            )
        )
        self._backend = backend
        self._in_flight: dict[int, Store | Load | Spill] = {}
        self._through: set[int] = set()
        """Of these, stores after which nobody has more room than before."""
        self.ended = 0
        """Transfers that have ended since the start."""
        self._copied: dict[tuple[type[Store | Load], Tier], _Copied] = {}
        for pages in backend.adoptable():
            self.handle(pages)

    @property
    def transfers_in_flight(self) -> int:
        """Transfers that the pager has asked for and not heard of since."""
        return len(self._in_flight)

    @property
    def room_coming(self) -> bool:
        """Whether there is a transfer in flight whose end may let somebody go on."""
        return len(self._in_flight) > len(self._through)

    def handle(self, event: Event) -> list[Instruction]:
        """Give the pager an event and the backend what follows from it.

        Returns the instructions, verdicts included, for the scheduler to read.
        """
        instructions = self.pager.handle(event)
        if instructions:
            self._backend.apply(instructions)
            for instruction in instructions:
                if isinstance(instruction, (Store, Load, Spill)):
                    self._in_flight[instruction.transfer] = instruction
                    if isinstance(instruction, Store) and instruction.through:
                        self._through.add(instruction.transfer)
        return instructions

    def settle(self) -> list[Instruction]:
        """Tell the pager of every transfer that has ended; returns what it makes of that."""
        followed: list[Instruction] = []
        while self._in_flight and (ended := self._backend.poll_transfers()):
            for result in ended:
                transfer = self._in_flight.pop(result.transfer)
                self._through.discard(result.transfer)
                self.ended += 1
                if result.ok:
                    self._commit(transfer)
                    if result.seconds > 0.0:
                        self._measure(transfer, result.seconds)
                kind = TransferDone if result.ok else TransferFailed
                followed += self.handle(kind(result.transfer))
        return followed

    def _commit(self, transfer: Store | Load | Spill) -> None:
        """Have the backend write down what pages a copy has left below.

        Before the pager hears of its end: then the slots may be given to others at once.
        """
        if isinstance(transfer, Load):
            return
        if isinstance(transfer, Store):
            places = [(transfer.tier, page.slot) for page in transfer.pages]
        else:
            places = [(transfer.target, move.target) for move in transfer.pages]
        self._backend.commit(transfer, [self.pager.page_name(*place) for place in places])

    def _measure(self, transfer: Store | Load | Spill, seconds: float) -> None:
        """Tell the pager how fast pages move, once enough of them have."""
        if isinstance(transfer, Spill):
            return
        copied = self._copied.setdefault((type(transfer), transfer.tier), _Copied())
        # A page is copied whole, however many of its tokens are valid.
        copied.tokens += len(transfer.pages) * self.pager.config.block_tokens
        copied.seconds += seconds
        if copied.tokens < _LEAST_OBSERVED:
            return
        rate = copied.tokens / copied.seconds
        if isinstance(transfer, Store):
            self.pager.observe(store_tokens_per_s=rate, tier=transfer.tier)
        else:
            self.pager.observe(load_tokens_per_s=rate, tier=transfer.tier)
        copied.tokens, copied.seconds = 0, 0.0
