"""How large a step's arrays are, which bucket it is padded to, and where they lie in one buffer.

Everything a step needs of the host travels in one copy. A CUDA graph reads its inputs at fixed
addresses, so the layout is a function of the padded shape alone; the ragged block tables, whose
size no shape tells, come last, and the copy ends where they end.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

ALIGNMENT = 16
"""Bytes every array is aligned to: the widest load of a GPU, and what Triton specialises on."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """The padded sizes of one forward pass."""

    tokens: int
    sequences: int
    rows: int
    """Rows of the batch whose logits are wanted."""
    decode: bool
    """One token per sequence, and the logits of all of them."""


@dataclass(frozen=True, slots=True)
class Section:
    """One array in the buffer."""

    offset: int
    """Bytes."""
    count: int
    """Elements."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the arrays of a `StepShape` lie. int32 but where another type is named."""

    shape: StepShape
    tokens: Section
    sources: Section
    """Per token: the draw of the step before that it is, or -1 where ``tokens`` has it."""
    positions: Section
    slots: Section
    """int64."""
    query_starts: Section
    context_lens: Section
    logit_rows: Section
    """int64."""
    table_starts: Section
    """Per sequence, and one more: where its blocks begin in ``tables``."""
    tables: int
    """Byte offset of the ragged block tables."""


def layout(shape: StepShape) -> Layout:
    """The layout of a shape."""
    at = 0

    def section(count: int, item: int) -> Section:
        nonlocal at
        begin = at
        at += -(-count * item // ALIGNMENT) * ALIGNMENT
        return Section(begin, count)

    return Layout(
        shape=shape,
        tokens=section(shape.tokens, 4),
        sources=section(shape.tokens, 4),
        positions=section(shape.tokens, 4),
        slots=section(shape.tokens, 8),
        query_starts=section(shape.sequences + 1, 4),
        context_lens=section(shape.sequences, 4),
        logit_rows=section(shape.rows, 8),
        table_starts=section(shape.sequences + 1, 4),
        tables=at,
    )


def decode_buckets(most: int) -> tuple[int, ...]:
    """Sequences of the decode graphs.

    A graph takes 20 ms of start-up to capture, and a row of padding costs a step what its matrix
    products cost: 0.006 ms up to 128 rows and 0.017 ms beyond (8B shape on an H200, steps of 4.3 to
    12.3 ms). So 8 rows apart the worst step pays 1 %, and 16 apart above 64 it pays 2.5 %; 4 apart
    below 64 would save half a percent and add eleven graphs.
    """
    sizes = [1, 2, 4, 8]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + (8 if sizes[-1] < 64 else 16))
    return (*(size for size in sizes if size < most), most)


MOST_SEQUENCES = 256
"""Sequences that run at the same time: the largest decode graph. From there on a step's time grows
with its sequences, so more of them would only slow each other down."""

MIXED_BUCKETS = (
    *(16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512),
    *(576, 640, 704, 768, 896, 1024, 1280, 1536, 1792, 2048),
)
"""Tokens of the graphs for steps that also have chunks of prompts. Launching every kernel of a step
by itself takes the host 10 ms and more, which the device takes for some 500 tokens: beside 256
streams it would wait for the host at every prompt."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """The shapes that are captured before the engine is ready."""

    decode: tuple[int, ...]
    mixed: tuple[int, ...]
    most_sequences: int

    def shapes(self) -> list[StepShape]:
        """All of them, the largest first: later graphs reuse the memory of earlier ones."""
        mixed = [self._mixed(tokens) for tokens in reversed(self.mixed)]
        return mixed + [StepShape(n, n, n, True) for n in reversed(self.decode)]

    def fit(self, tokens: int, sequences: int, decode: bool) -> StepShape | None:
        """The smallest bucket that holds a step, or None if it is larger than all.

        Args:
            tokens: Its input tokens.
            sequences: Its runs, of which each may want one row of logits.
            decode: Whether every run has one token and wants its logits.
        """
        if decode and sequences <= self.decode[-1]:
            size = self.decode[bisect_left(self.decode, sequences)]
            return StepShape(size, size, size, True)
        if not self.mixed or tokens > self.mixed[-1]:
            return None
        shape = self._mixed(self.mixed[bisect_left(self.mixed, tokens)])
        return shape if sequences <= shape.rows else None

    def _mixed(self, tokens: int) -> StepShape:
        # Every run has a token, so there are never more runs than tokens; and one of padding.
        rows = min(tokens, self.most_sequences)
        return StepShape(tokens, rows + 1, rows, False)
