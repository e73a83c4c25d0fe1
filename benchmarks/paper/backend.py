"""A backend that only keeps time: steps and transfers take as long as the latency model says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.paper.model import BLOCK_TOKENS, LONGEST, TOKEN_BYTES, LatencyModel
from benchmarks.paper.workload import VOCABULARY
from kvpager.types import Adopt, Instruction, Load, PageName, Spill, Store
from pagedd_daemon.backends.base import (
    Capabilities,
    Elastic,
    Embedder,
    Handle,
    MemoryReport,
    Step,
    StepResult,
    TransferResult,
)

MAX_STEP_TOKENS = 2560


@dataclass(frozen=True, slots=True)
class _Ends:
    epoch: int
    seconds: float
    at_s: float


class TimingBackend:
    """Implements `pagedd_daemon.backends.base.Backend` over simulated time, `now_s`.

    Nothing is computed or moved. Swapping and loading hold up the next step for all they take, the
    less favourable assumption; only writing finished pages back to RAM (`Store` of no sequence)
    overlaps with steps, one transfer after the other.
    """

    elastic: Elastic | None = None
    """See `Backend`."""
    embedder: Embedder | None = None
    """See `Backend`."""

    def __init__(self, model: LatencyModel, blocks: int, block_tokens: int = BLOCK_TOKENS) -> None:
        """Time 0.

        Args:
            model: How long things take.
            blocks: Blocks of the first tier.
            block_tokens: Tokens in a block of a transfer. The scheduler is told `BLOCK_TOKENS`
                whatever the policy, so that it cuts prompts the same way for all.
        """
        self.now_s = 0.0
        self.transfer_s = 0.0
        """Seconds in which transfers held up steps."""
        self.padding = 0
        """Sequences a step computes beside its runs (static batches)."""
        self._model = model
        self._block_tokens = block_tokens
        self._ended: list[TransferResult] = []
        self._overlapped: list[tuple[float, TransferResult]] = []
        self._link_free_s = 0.0
        self._blocked_s = 0.0
        self.capabilities = Capabilities(
            name="timing",
            device="simulated A100",
            model_digest=bytes(32),
            kv_dtype="f16",
            vocab_size=VOCABULARY,
            context_tokens=LONGEST + 1,
            eog_tokens=frozenset(),
            gpu_blocks=blocks,
            ram_blocks=0,
            block_tokens=BLOCK_TOKENS,
            block_bytes=block_tokens * TOKEN_BYTES,
            max_sequences=0,
            max_step_tokens=MAX_STEP_TOKENS,
            asynchronous=False,
            keep_cached_on_gpu=True,
        )

    def apply(self, instructions: Iterable[Instruction]) -> None:
        """See `Backend`: only transfers take time."""
        for instruction in instructions:
            if isinstance(instruction, (Store, Load)):
                pages = instruction.pages
                # A block is contiguous over all layers: one copy each.
                seconds = self._model.transfer(len(pages) * self._block_tokens, len(pages))
                if isinstance(instruction, Store) and instruction.seq < 0:
                    self._link_free_s = max(self._link_free_s, self.now_s) + seconds
                    result = TransferResult(instruction.transfer, ok=True, seconds=seconds)
                    self._overlapped.append((self._link_free_s, result))
                else:
                    self._blocked_s += seconds
                    self._ended.append(TransferResult(instruction.transfer, True, seconds))

    def launch(self, step: Step) -> Handle:
        """See `Backend`."""
        prefill = sum(len(run.tokens) for run in step.runs if len(run.tokens) > 1)
        seconds = self._model.step(len(step.runs) + self.padding, prefill)
        self.transfer_s += self._blocked_s
        ends = _Ends(step.epoch, seconds, self.now_s + self._blocked_s + seconds)
        self._blocked_s = 0.0
        return ends

    def draw(self, handle: Handle) -> None:
        """See `Backend`: nothing is put off."""

    def collect(self, handle: Handle) -> StepResult:
        """See `Backend`. Draws nothing: which tokens come out is the caller's."""
        assert isinstance(handle, _Ends)
        self.now_s = handle.at_s
        return StepResult(handle.epoch, [], handle.seconds)

    def commit(self, transfer: Store | Spill, names: Sequence[PageName | None]) -> None:
        """See `Backend`: nobody comes after this one."""

    def adoptable(self) -> list[Adopt]:
        """See `Backend`; none."""
        return []

    def troubles(self) -> list[str]:
        """See `Backend`; none."""
        return []

    def poll_transfers(self) -> list[TransferResult]:
        """See `Backend`."""
        ended, self._ended = self._ended, []
        while self._overlapped and self._overlapped[0][0] <= self.now_s:
            ended.append(self._overlapped.pop(0)[1])
        return ended

    def wait(self, until_s: float) -> None:
        """Let time pass without a step."""
        self.transfer_s += self._blocked_s
        self._blocked_s = 0.0
        self.now_s = max(self.now_s, until_s)

    def next_transfer_s(self) -> float | None:
        """When the next transfer ends, if any is under way."""
        if self._ended:
            return self.now_s + self._blocked_s
        return self._overlapped[0][0] if self._overlapped else None

    def counters(self) -> dict[str, int]:
        """See `Backend`; none."""
        return {}

    def memory(self) -> MemoryReport:
        """See `Backend`."""
        return MemoryReport(0, 0, 0)

    def close(self) -> None:
        """See `Backend`."""
