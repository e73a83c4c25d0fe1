"""Samplers of the engine as parameters of one draw on the device.

Columns that no row of a step uses are left out, so a greedy batch is one argmax. Random numbers are
the host's, keyed as in `pagedd_daemon.engine.sampler`. Where a sequence's last token is not known
on the host yet (`PENDING`), its sampler stands one token back: the random number and the masks are
those of one token later, and the table of what was seen is brought up to date on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedd_daemon.backends.paged.layout import ALIGNMENT
from pagedd_daemon.engine.grammar import Matcher, write_words
from pagedd_daemon.engine.sampler import Sampler
from pagedd_kernels import Penalties, SampleParams, fill_counts

WIDTHS = (8, 128, 1024)
"""Columns of biases and masks: an end of generation or two, a list, the most there may be."""
_LEAST_ROWS = 16
"""Rows of the table of counts to begin with: 8 MB with a vocabulary of 128,256."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One draw: from which row of the step's logits, how, and for a token how far ahead."""

    row: int
    sampler: Sampler
    ahead: int
    """1 where the sampler has not accepted the token that the step before draws, else 0."""


@dataclass(slots=True)
class _Seen:
    """A row of the table of counts."""

    row: int
    sampler: Sampler
    generated: int
    """Tokens it counts, or will once the steps in flight are over."""
    used: int
    """The last draw that used it."""


class CountTable:
    """What penalties look at, per sampler, on the device."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        """No table before the first penalty."""
        self._vocab = vocab_size
        self._device = device
        self._table: Tensor | None = None
        self._rows: dict[int, _Seen] = {}
        self._draws = 0

    def rows(self, wanted: Sequence[Wanted]) -> tuple[list[int], Tensor]:
        """Rows of the table for each draw (-1: without penalties), brought up to date."""
        self._draws += 1
        found = []
        try:
            for one in wanted:
                known = self._row_of(one) if one.sampler.penalised else None
                found.append(-1 if known is None else known)
        except RuntimeError:  # no memory for a larger table
            self.undo(wanted)
            raise
        assert self._table is not None
        return found, self._table

    def undo(self, wanted: Sequence[Wanted]) -> None:
        """The draws that `rows` was asked for last did not happen."""
        for one in wanted:
            seen = self._rows.get(id(one.sampler))
            if seen is not None and seen.used == self._draws:
                seen.generated -= 1

    def forget(self, samplers: Iterable[Sampler]) -> None:
        """What was drawn with these last did not happen: their counts are made anew. Nothing that
        counts on their rows may be in flight."""
        for sampler in samplers:
            self._rows.pop(id(sampler), None)

    def _row_of(self, one: Wanted) -> int:
        sampler = one.sampler
        seen = self._rows.get(id(sampler))
        generated = sampler.generated + one.ahead
        if seen is None or seen.generated != generated:
            # Pending only follows a draw of the same sampler, which left the row as it must be.
            assert not one.ahead
            if seen is None:
                seen = self._rows[id(sampler)] = _Seen(self._take(), sampler, 0, 0)
            assert self._table is not None
            prompt, tokens = map(self._send, sampler.seen())
            fill_counts(self._table, seen.row, prompt, tokens)
        seen.generated = generated + 1
        seen.used = self._draws
        return seen.row

    def _send(self, values: npt.NDArray[np.int64]) -> Tensor:
        host = torch.from_numpy(values)
        if self._device.type != "cuda":
            return host
        # From pageable memory the copy would wait for the steps in flight.
        return host.pin_memory().to(self._device, non_blocking=True)

    def _take(self) -> int:
        """A free row, or that of whoever has not drawn for longest, or a larger table.

        A row used by this draw or by the one before stays: a step may be in flight that counts on
        it.
        """
        size = 0 if self._table is None else self._table.shape[0]
        if len(self._rows) < size:
            return min(set(range(size)) - {seen.row for seen in self._rows.values()})
        oldest = min(self._rows.items(), key=lambda item: item[1].used, default=None)
        if oldest is not None and oldest[1].used < self._draws - 1:
            del self._rows[oldest[0]]
            return oldest[1].row
        shape = (max(2 * size, _LEAST_ROWS), self._vocab)
        larger = torch.zeros(shape, dtype=torch.int32, device=self._device)
        if self._table is not None:
            larger[:size] = self._table
        self._table = larger
        return size


@dataclass(slots=True)
class _Columns:
    """Arrays of one draw in a staging buffer."""

    buffer: npt.NDArray[np.uint8]
    end: int
    places: dict[str, tuple[int, tuple[int, ...], Any]] = field(default_factory=dict)
    """Name to offset, shape and type."""

    def put(self, name: str, values: npt.NDArray[Any]) -> None:
        self.take(name, values.shape, values.dtype)[:] = values

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """The array itself, for the caller to write."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        array: npt.NDArray[Any] = self.buffer[self.end : self.end + size].view(dtype)
        array = array.reshape(shape)
        self.places[name] = (self.end, shape, torch.from_numpy(array).dtype)
        self.end += -(-size // ALIGNMENT) * ALIGNMENT
        return array


@dataclass(frozen=True, slots=True)
class StagedDraw:
    """The parameters of a draw, written and waiting for the copy to the device."""

    end: int
    """Bytes of the buffer that are written."""
    places: dict[str, tuple[int, tuple[int, ...], Any]]
    counts: Tensor | None
    logprobs: int

    def params(self, buffer: Tensor) -> SampleParams:
        """The parameters over the device's copy of the buffer."""

        def column(name: str) -> Tensor | None:
            place = self.places.get(name)
            if place is None:
                return None
            offset, shape, dtype = place
            count = int(np.prod(shape))
            part = buffer[offset : offset + count * dtype.itemsize]
            return part.view(dtype).view(shape)

        def present(name: str) -> Tensor:
            found = column(name)
            assert found is not None
            return found

        penalties = None
        if self.counts is not None:
            names = ("rows", "repetition", "presence", "frequency")
            rows, repetition, presence, frequency = map(present, names)
            penalties = Penalties(rows, self.counts, repetition, presence, frequency)
        bias = None
        if "bias_ids" in self.places:
            bias = (present("bias_ids"), present("bias_values"))
        allowed = None
        if "allowed" in self.places:
            allowed = (present("allowed_rows"), present("allowed"))
        return SampleParams(
            temperature=column("temperature"),
            uniform=column("uniform"),
            top_k=column("top_k"),
            top_p=column("top_p"),
            min_p=column("min_p"),
            typical_p=column("typical_p"),
            penalties=penalties,
            bias=bias,
            masked=column("masked"),
            allowed=allowed,
            logprobs=self.logprobs,
        )


def stage(
    wanted: Sequence[Wanted],
    counts: CountTable,
    buffer: npt.NDArray[np.uint8],
    begin: int,
    write_words: Callable[[Sequence[Matcher], npt.NDArray[np.int32]], None] = write_words,
) -> StagedDraw:
    """Write the parameters of a draw into a staging buffer, from byte ``begin`` on.

    ``write_words`` writes what grammars let follow.
    """
    columns = _Columns(buffer, begin)
    samplers = [one.sampler for one in wanted]
    params = [sampler.params for sampler in samplers]
    if any(p.temperature > 0 for p in params):
        draws = [one.sampler.uniform(one.ahead) for one in wanted]
        columns.put("temperature", np.array([p.temperature for p in params], np.float32))
        columns.put("uniform", np.array(draws, np.float64))
        # All three or none: each combination would be a kernel to compile at start.
        if any(p.top_k or p.top_p < 1.0 or p.min_p > 0.0 for p in params):
            columns.put("top_k", np.array([p.top_k for p in params], np.int32))
            columns.put("top_p", np.array([p.top_p for p in params], np.float64))
            columns.put("min_p", np.array([p.min_p for p in params], np.float64))
        if any(p.typical_p < 1.0 for p in params):
            columns.put("typical_p", np.array([p.typical_p for p in params], np.float64))
    table = None
    if any(sampler.penalised for sampler in samplers):
        rows, table = counts.rows(wanted)
        columns.put("rows", np.array(rows, np.int32))
        columns.put("repetition", np.array([p.repetition_penalty for p in params], np.float32))
        columns.put("presence", np.array([p.presence_penalty for p in params], np.float32))
        columns.put("frequency", np.array([p.frequency_penalty for p in params], np.float32))
    biases = [sampler.bias() for sampler in samplers]
    if any(ids.size for ids, _ in biases):
        columns.put("bias_ids", _padded([ids for ids, _ in biases], np.int32, -1))
        columns.put("bias_values", _padded([values for _, values in biases], np.float32, 0))
    masks = [one.sampler.masked(one.ahead) for one in wanted]
    if any(mask.size for mask in masks):
        columns.put("masked", _padded(masks, np.int32, -1))
    if any(sampler.matcher is not None for sampler in samplers):
        _put_allowed(columns, samplers, write_words)
    logprobs = max((p.logprobs for p in params), default=-1)
    return StagedDraw(columns.end, columns.places, table, logprobs)


def _put_allowed(
    columns: _Columns,
    samplers: Sequence[Sampler],
    write_words: Callable[[Sequence[Matcher], npt.NDArray[np.int32]], None],
) -> None:
    """What grammars let follow: a line for each sample that has one."""
    at = np.full(len(samplers), -1, np.int32)
    matchers: list[Matcher] = []
    for row, sampler in enumerate(samplers):
        if sampler.matcher is not None:
            at[row] = len(matchers)
            matchers.append(sampler.matcher)
    columns.put("allowed_rows", at)
    shape = len(matchers), -(-samplers[0].vocab_size // 32)
    # Where they lie, not copied there: 16 KB each.
    write_words(matchers, columns.take("allowed", shape, np.int32))


def _padded(rows: Sequence[npt.NDArray[Any]], dtype: Any, padding: int) -> npt.NDArray[Any]:
    """Ragged rows as one array, of one of few widths: kernels are compiled for each."""
    longest = max(row.size for row in rows)
    width = next((w for w in WIDTHS if w >= longest), longest)
    out = np.full((len(rows), width), padding, dtype)
    for at, row in enumerate(rows):
        out[at, : row.size] = row
    return out
