"""Drives a `Decoder` without a backend: block tables in random order, batches made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pagedd_daemon.models.decoder import Decoder
from pagedd_kernels.batch import StepBatch

Ids = Sequence[int]


class PagedSequences:
    """Sequences whose keys and values lie in one pool, in blocks that were dealt at random."""

    def __init__(
        self, decoder: Decoder, lengths: Sequence[int], block_tokens: int = 16, seed: int = 0
    ) -> None:
        """Room for sequences of these lengths, and block 0, the padding block."""
        self.decoder = decoder
        self.block_tokens = block_tokens
        self.done = [0] * len(lengths)
        sizes = [-(-length // block_tokens) for length in lengths]
        order = np.random.default_rng(seed).permutation(sum(sizes)) + 1
        ends = np.cumsum(sizes)
        self.tables = [
            order[end - size : end].tolist() for size, end in zip(sizes, ends, strict=True)
        ]
        self.kv = new_pool(decoder, 1 + sum(sizes), block_tokens)

    def step(self, tokens: dict[int, Ids], *, every: bool = False) -> Tensor:
        """Feed tokens to sequences; the logits after the last of each, or after every one."""
        batch = self.batch(tokens, every=every)
        for sequence, ids in tokens.items():
            self.done[sequence] += len(ids)
        with torch.inference_mode():
            return self.decoder.forward(batch, self.kv)

    def batch(self, tokens: dict[int, Ids], *, every: bool) -> StepBatch:
        """The step as device tensors."""
        ids, positions, slots, starts = [], [], [], [0]
        for sequence, new in tokens.items():
            first, table = self.done[sequence], self.tables[sequence]
            for offset, token in enumerate(new):
                position = first + offset
                block, within = divmod(position, self.block_tokens)
                ids.append(token)
                positions.append(position)
                slots.append(table[block] * self.block_tokens + within)
            starts.append(len(ids))
        width = max(len(self.tables[s]) for s in tokens)
        tables = [self.tables[s] + [0] * (width - len(self.tables[s])) for s in tokens]
        lengths = [self.done[s] + len(new) for s, new in tokens.items()]
        rows = range(len(ids)) if every else [end - 1 for end in starts[1:]]
        return StepBatch(
            tokens=self._tensor(ids),
            positions=self._tensor(positions),
            slots=self._tensor(slots, torch.int64),
            block_tables=self._tensor(tables),
            query_starts=self._tensor(starts),
            context_lens=self._tensor(lengths),
            logit_rows=self._tensor(list(rows), torch.int64),
            max_query=max(map(len, tokens.values())),
            max_context=max(lengths),
        )

    def _tensor(
        self, values: list[int] | list[list[int]], dtype: torch.dtype = torch.int32
    ) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.decoder.device)


def new_pool(decoder: Decoder, blocks: int, block_tokens: int) -> Tensor:
    """An empty pool: NaN where nothing was written yet, but for the padding block."""
    config = decoder.config
    shape = (blocks, config.layers, 2, block_tokens, config.kv_heads, config.head_dim)
    pool = torch.full(shape, torch.nan, dtype=decoder.dtype, device=decoder.device)
    pool[0] = 0
    return pool


def greedy(decoder: Decoder, prompt: Ids, count: int, chunk: int = 1 << 30) -> list[int]:
    """The likeliest continuation, the prompt fed in chunks."""
    run = PagedSequences(decoder, [len(prompt) + count])
    logits = torch.empty(0)
    for first in range(0, len(prompt), chunk):
        logits = run.step({0: prompt[first : first + chunk]})
    tokens: list[int] = []
    while len(tokens) < count:
        tokens.append(int(logits[0].argmax()))
        logits = run.step({0: tokens[-1:]})
    return tokens
