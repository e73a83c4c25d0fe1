"""Where the pager's instructions meet the backend's memory."""

from __future__ import annotations

from kvpager import Pager
from kvpager.types import Event, Instruction, PagerConfig, TransferDone, TransferFailed
from pagedd_daemon.backends.base import Backend


class Pool:
    """The pager and the backend that carries out what it says, kept in step."""

    def __init__(self, backend: Backend, pager: Pager | None = None) -> None:
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
                block_tokens=caps.block_tokens,
                max_sequences=caps.max_sequences,
                keep_cached_on_gpu=caps.keep_cached_on_gpu,
            )
        )
        self._backend = backend
        self.transfers_in_flight = 0

    def handle(self, event: Event) -> list[Instruction]:
        """Give the pager an event and the backend what follows from it.

        Returns the instructions, verdicts included, for the scheduler to read.
        """
        instructions = self.pager.handle(event)
        if instructions:
            self._backend.apply(instructions)
            self.transfers_in_flight += sum(hasattr(i, "transfer") for i in instructions)
        return instructions

    def settle(self) -> list[Instruction]:
        """Tell the pager of every transfer that has ended; returns what it makes of that."""
        followed: list[Instruction] = []
        while self.transfers_in_flight and (ended := self._backend.poll_transfers()):
            for result in ended:
                self.transfers_in_flight -= 1
                kind = TransferDone if result.ok else TransferFailed
                followed += self.handle(kind(result.transfer))
        return followed
