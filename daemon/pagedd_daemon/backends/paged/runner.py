"""From a step's inputs on the device to its logits: kernel by kernel, or as one CUDA graph.

Graphs are captured for the buckets of `layout.Buckets` before the engine is ready. All of them read
their inputs from one buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pagedd_daemon.backends.base import SCORED_ROWS
from pagedd_daemon.backends.paged.graphs import Capturer, Graph
from pagedd_daemon.backends.paged.layout import Layout, StepShape, layout
from pagedd_daemon.backends.paged.staging import device_arrays
from pagedd_daemon.models.config import ModelConfig
from pagedd_kernels import StepBatch
from pagedd_kernels.inputs import resolve_tokens, unpack_tables

SAMPLING_BYTES_PER_ROW = 13 << 10
"""Room for what a draw is told: up to 1,024 biases of 8 bytes and as many masked ids, and a line of
numbers."""


class Model(Protocol):
    """What computes: `pagedd_daemon.models.decoder.Decoder`, or a test's."""

    config: ModelConfig
    context_tokens: int
    device: torch.device
    dtype: torch.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of everything it holds on the device."""
        ...

    def forward(self, batch: StepBatch, kv: Tensor) -> Tensor:
        """One step: logits ``[N, vocab_size]``."""
        ...

    def rehearse(self, batch: StepBatch, kv: Tensor) -> None:
        """Every kernel of `forward` once, on a batch of padding."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may hold at most."""

    sequences: int
    """Runs, and draws."""
    step_tokens: int
    context_tokens: int
    block_tokens: int
    vocab_size: int

    @property
    def table_width(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.context_tokens // self.block_tokens)

    def buffer_bytes(self) -> int:
        """Of the largest step, its tables and the parameters of its draws."""
        sequences = self.sequences
        rows = sequences + SCORED_ROWS
        largest = layout(StepShape(self.step_tokens, sequences + 1, rows, False))
        tables = 4 * sequences * self.table_width
        allowed = 4 * -(-self.vocab_size // 32)  # what a grammar lets follow
        return largest.tables + tables + (SAMPLING_BYTES_PER_ROW + allowed) * sequences


class Runner:
    """Computes steps whose inputs are in `inputs`."""

    def __init__(
        self, model: Model, kv: Tensor, limits: Limits, capturer: Capturer | None = None
    ) -> None:
        """A runner without graphs.

        Args:
            model: What computes.
            kv: The pool.
            limits: The largest step.
            capturer: Makes graphs; None where there are none.
        """
        self.model = model
        self.limits = limits
        self._kv = kv
        self._capturer = capturer
        device = model.device
        self.inputs = torch.zeros(limits.buffer_bytes(), dtype=torch.uint8, device=device)
        """A step's arrays, as its `Layout` says."""
        self.drawn = torch.zeros(limits.sequences, dtype=torch.int32, device=device)
        """Tokens of the last step's draws, in its order: what `PENDING` stands for."""
        shape = (limits.sequences + 1, limits.table_width)
        self._tables = torch.zeros(shape, dtype=torch.int32, device=device)
        self._graphs: dict[StepShape, Graph] = {}

    @property
    def graphs(self) -> int:
        """How many there are."""
        return len(self._graphs)

    def run(self, where: Layout, max_query: int) -> Tensor:
        """Logits of the step in `inputs`, ``[rows, vocab_size]``, valid until the next run.

        Args:
            where: Its layout.
            max_query: Most tokens of one run.
        """
        known = self._graphs.get(where.shape)
        if known is None:
            return self._compute(where, max_query)
        known.replay()
        return known.logits

    def capture(self, shape: StepShape) -> None:
        """Make the graph of a bucket that was rehearsed."""
        assert self._capturer is not None
        where = layout(shape)
        self._pad(where)
        most = 1 if shape.decode else shape.tokens
        self._graphs[shape] = self._capturer.capture(lambda: self._compute(where, most))

    def forget(self) -> None:
        """Give the graphs back."""
        self._graphs.clear()

    def rehearse(self, shape: StepShape) -> None:
        """Launch every kernel of a step of this shape once, on padding: what it needs is compiled,
        loaded and allocated then."""
        where = layout(shape)
        self._pad(where)
        self.model.rehearse(self._batch(where, 1 if shape.decode else shape.tokens), self._kv)

    def _pad(self, where: Layout) -> None:
        """A step of padding, each row of which belongs to a sequence, as the kernels ask."""
        self.inputs.zero_()
        starts = device_arrays(self.inputs, where).query_starts
        if where.shape.decode:
            starts.copy_(torch.arange(len(starts)))
        else:
            starts[1:] = where.shape.tokens

    def close(self) -> None:
        """Give graphs and buffers back."""
        self.forget()
        self.inputs = self.drawn = self._tables = self._kv = torch.empty(0)

    def _compute(self, where: Layout, max_query: int) -> Tensor:
        return self.model.forward(self._batch(where, max_query), self._kv)

    def _batch(self, where: Layout, max_query: int) -> StepBatch:
        arrays = device_arrays(self.inputs, where)
        tables = self._tables[: where.shape.sequences]
        return StepBatch(
            tokens=resolve_tokens(arrays.tokens, arrays.sources, self.drawn),
            positions=arrays.positions,
            slots=arrays.slots,
            block_tables=unpack_tables(arrays.tables, arrays.table_starts, tables),
            query_starts=arrays.query_starts,
            context_lens=arrays.context_lens,
            logit_rows=arrays.logit_rows,
            max_query=max_query,
            # Not the longest of this step: other bounds may lead to other kernels, to be compiled.
            max_context=self.limits.context_tokens,
        )
