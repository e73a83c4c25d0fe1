"""A step's arrays on the host, written with NumPy into memory the device fetches in one copy.

The device copies from the buffer while the host already plans the next step, so there are several
and each is written again only after the copy out of it has ended: a staging buffer that is filled
while it is read is how another engine came to compute with the wrong blocks (vllm PR 32799).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedd_daemon.backends.base import PENDING, Run
from pagedd_daemon.backends.paged.layout import Layout, Section

Ints: TypeAlias = npt.NDArray[np.int32]
Longs: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class HostArrays:
    """The sections of a `Layout` as NumPy arrays over one buffer."""

    tokens: Ints
    sources: Ints
    positions: Ints
    slots: Longs
    query_starts: Ints
    context_lens: Ints
    logit_rows: Longs
    table_starts: Ints
    tables: Ints
    """All that is left of the buffer."""


@dataclass(frozen=True, slots=True)
class DeviceArrays:
    """The same as tensors over the device's buffer."""

    tokens: Tensor
    sources: Tensor
    positions: Tensor
    slots: Tensor
    query_starts: Tensor
    context_lens: Tensor
    logit_rows: Tensor
    table_starts: Tensor
    tables: Tensor


def device_arrays(buffer: Tensor, where: Layout) -> DeviceArrays:
    """Views of ``buffer`` (uint8) as ``where`` says."""

    def view(section: Section, dtype: torch.dtype) -> Tensor:
        size = section.count * dtype.itemsize
        return buffer[section.offset : section.offset + size].view(dtype)

    return DeviceArrays(
        tokens=view(where.tokens, torch.int32),
        sources=view(where.sources, torch.int32),
        positions=view(where.positions, torch.int32),
        slots=view(where.slots, torch.int64),
        query_starts=view(where.query_starts, torch.int32),
        context_lens=view(where.context_lens, torch.int32),
        logit_rows=view(where.logit_rows, torch.int64),
        table_starts=view(where.table_starts, torch.int32),
        tables=buffer[where.tables :].view(torch.int32),
    )


def host_arrays(buffer: npt.NDArray[np.uint8], where: Layout) -> HostArrays:
    """Views of ``buffer`` as ``where`` says."""

    def ints(section: Section) -> Ints:
        return buffer[section.offset : section.offset + 4 * section.count].view(np.int32)

    def longs(section: Section) -> Longs:
        return buffer[section.offset : section.offset + 8 * section.count].view(np.int64)

    return HostArrays(
        tokens=ints(where.tokens),
        sources=ints(where.sources),
        positions=ints(where.positions),
        slots=longs(where.slots),
        query_starts=ints(where.query_starts),
        context_lens=ints(where.context_lens),
        logit_rows=longs(where.logit_rows),
        table_starts=ints(where.table_starts),
        tables=buffer[where.tables :].view(np.int32),
    )


@dataclass(frozen=True, slots=True)
class Filled:
    """What was written of a step."""

    blocks: int
    """Blocks in ``tables``."""
    drawing: list[int]
    """The runs that draw, in the order of their rows of logits. Behind these are the rows of
    `Run.follows`, in the order of the runs."""
    ahead: list[int]
    """For each of them, whether its last token is `PENDING`: 1, else 0."""
    max_query: int


def fill(
    host: HostArrays,
    runs: Sequence[Run],
    drawn: Mapping[int, int],
    block_tokens: int,
    *,
    decode: bool,
) -> Filled:
    """Write a step, and padding behind it.

    Args:
        host: Where to; its sizes are those of the padded shape.
        runs: Who takes part.
        drawn: Of the step before: which draw a sequence's token is.
        block_tokens: Tokens per block.
        decode: The shape is one of one token per sequence, in padding too.
    """
    count = len(runs)
    parts = [run.tokens for run in runs]
    lengths = np.fromiter(map(len, parts), np.int32, count)
    starts = np.fromiter([run.start for run in runs], np.int32, count)
    ends = np.cumsum(lengths, dtype=np.int32)
    total = int(ends[-1])
    blocks = _fill_tables(host, runs, starts + lengths, block_tokens)

    tokens = host.tokens
    np.concatenate(parts, out=tokens[:total])
    tokens[total:] = 0
    sources = host.sources
    sources.fill(-1)
    for at in (tokens[:total] == PENDING).nonzero()[0].tolist():
        run = runs[int(ends.searchsorted(at, side="right"))]
        sources[at] = drawn[run.seq]
        tokens[at] = 0

    positions = host.positions
    first = ends - lengths
    if total == count:
        positions[:total] = starts
        base = host.table_starts[:count]
    else:
        positions[:total] = np.arange(total, dtype=np.int32) - np.repeat(first - starts, lengths)
        base = np.repeat(host.table_starts[:count], lengths)
    positions[total:] = 0
    where = positions[:total]
    slots = host.slots
    slots[:total] = host.tables[base + where // block_tokens]
    slots[:total] *= block_tokens
    slots[:total] += where % block_tokens
    slots[total:] = 0  # the padding block

    host.query_starts[0] = 0
    host.query_starts[1 : count + 1] = ends
    # The rows of padding belong to sequences of nothing: one each in a decode step, else one all.
    padding = host.query_starts[count + 1 :]
    padding[:] = np.arange(count + 1, count + 1 + len(padding)) if decode else len(tokens)
    host.context_lens[:count] = starts + lengths
    host.context_lens[count:] = 0
    drawing = [at for at, run in enumerate(runs) if run.draws]
    rows = host.logit_rows
    wanted = ends[drawing] - 1
    rows[: len(drawing)] = wanted
    used = len(drawing)
    for at, run in enumerate(runs):
        if run.follows is not None:
            begin, used = used, used + len(run.follows)
            rows[begin:used] = np.arange(first[at], first[at] + used - begin)
    rows[used:] = 0
    return Filled(
        blocks=blocks,
        drawing=drawing,
        ahead=(sources[wanted] >= 0).astype(np.int64).tolist(),
        max_query=int(lengths.max()),
    )


def _fill_tables(host: HostArrays, runs: Sequence[Run], ends: Ints, block_tokens: int) -> int:
    """The ragged block tables, as blocks of the arena: its first one is for padding."""
    needed = -(-ends // block_tokens)
    tables = [run.block_table[:n] for run, n in zip(runs, needed.tolist(), strict=True)]
    count = len(runs)
    starts = host.table_starts
    starts[0] = 0
    np.cumsum(needed, out=starts[1 : count + 1])
    blocks = int(starts[count])
    starts[count + 1 :] = blocks
    flat = host.tables[:blocks]
    np.concatenate(tables, out=flat)
    flat += 1
    return blocks


class HostBuffer:
    """One staging buffer, page-locked where a device copies from it."""

    def __init__(self, size: int, *, pinned: bool) -> None:
        """``size`` bytes."""
        self._memory = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
        self.bytes = self._memory.numpy()
        """All of it."""
        self._copied = torch.cuda.Event() if pinned else None
        self._views: dict[Layout, HostArrays] = {}

    def arrays(self, where: Layout, *, keep: bool) -> HostArrays:
        """Its sections; ``keep`` the views, for a shape that will come again."""
        views = self._views.get(where)
        if views is None:
            views = host_arrays(self.bytes, where)
            if keep:
                self._views[where] = views
        return views

    def wait(self) -> None:
        """Until nothing is copied out of it any more."""
        if self._copied is not None:
            self._copied.synchronize()

    def copy_to(self, target: Tensor, size: int) -> None:
        """Copy the first ``size`` bytes to a tensor of the device, in the current stream."""
        target[:size].copy_(self._memory[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
