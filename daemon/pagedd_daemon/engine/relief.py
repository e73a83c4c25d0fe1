"""When the device had no memory for a step: what is given up so that it can be tried again."""

from __future__ import annotations

import logging
import math

from pagedd_daemon.backends.base import Capabilities, Elastic
from pagedd_daemon.engine.residents import Residents
from pagedd_daemon.engine.room import Room
from pagedd_daemon.engine.turns import Turns
from pagedd_daemon.engine.work import Request, Sequence, SequenceState

log = logging.getLogger(__name__)

LEAST_BYTES = 64 << 20
"""What the pool gives back at first; twice as much each time that this was not enough."""
PLENTY_BYTES = 1 << 30
"""Where so much is free and a step still found nothing, more of the pool would not help it."""
QUIET_S = 10.0
"""After so long without such a step, what was given up is taken back bit by bit."""


def floor_blocks(caps: Capabilities) -> int:
    """Blocks that a pool keeps whoever else wants the memory: the longest text can still be served,
    unless that is more than a quarter of all."""
    longest = -(-caps.context_tokens // caps.block_tokens) + 1
    return max(2, min(longest, caps.gpu_blocks // 4))


class Relief:
    """A smaller pool first, where that gives memory back; then fewer requests at a time.

    Backends have cut a step into small pieces before they say that there is no memory for it.
    """

    def __init__(
        self,
        residents: Residents,
        room: Room,
        turns: Turns,
        capabilities: Capabilities,
        elastic: Elastic | None,
    ) -> None:
        self._residents = residents
        self._room = room
        self._turns = turns
        self._elastic = elastic
        self._block_bytes = capabilities.block_bytes
        self._floor = floor_blocks(capabilities)
        self._bytes = LEAST_BYTES
        self._since = -math.inf
        """When memory was missing last, or `_most` was raised."""
        self._most = 0
        """Requests that may run at the same time; 0: any number."""

    def smaller(self, blocks: int, now: float) -> int:
        """Blocks for a pool that has ``blocks``: fewer, where the device gets memory for them."""
        if now - self._since > QUIET_S:
            self._bytes = LEAST_BYTES
        self._since = now
        if self._elastic is None or self._elastic.free_bytes() >= PLENTY_BYTES:
            return blocks
        fewer = blocks - -(-self._bytes // self._block_bytes)
        self._bytes *= 2
        return min(blocks, max(fewer, self._floor))

    def thin_out(self, failed: list[Sequence], now: float) -> bool:
        """Page out the least important request of a step that there was no memory for; False where
        it had only one."""
        alive = [s for s in failed if s.state is SequenceState.RUNNING]
        if len({s.request.rid for s in alive}) < 2:
            return not alive
        removable = [s for s in alive if s.removable]
        victim = self._room.choose(self._turns.victims(removable)) or removable[-1]
        self._since = now
        self._most = self._running() - 1
        log.warning("no memory for a step: %d requests at a time", self._most)
        self._room.page_out(victim)
        self._residents.hear()
        return True

    def full(self, candidate: Request, now: float) -> bool:
        """Whether ``candidate`` would be one too many. Every `QUIET_S` twice as many may run."""
        if self._most and now - self._since > QUIET_S:
            self._since = now
            self._most *= 2
            if self._most > len(self._residents.sequences):
                self._most = 0  # it keeps nobody out
        if not self._most or any(_runs(s) for s in candidate.sequences.values()):
            return False
        return self._running() >= self._most

    def _running(self) -> int:
        return len({s.request.rid for s in self._residents.sequences.values() if _runs(s)})


def _runs(sequence: Sequence) -> bool:
    return sequence.state in (SequenceState.RUNNING, SequenceState.LOADING)
