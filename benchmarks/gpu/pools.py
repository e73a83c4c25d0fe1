"""Pools of random KV on a GPU, and steps over them, for measuring attention."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedd_kernels import AttentionShape, StepBatch

BLOCK_TOKENS, KV_HEADS, HEAD_DIM = 16, 8, 128


class Arena:
    """One large allocation, viewed as a pool of as many layers as fit."""

    def __init__(self, bytes_: int) -> None:
        self.memory = torch.empty(bytes_ // 2, dtype=torch.bfloat16, device="cuda")
        for part in torch.split(self.memory, 1 << 28):
            part.normal_()

    def pool(self, blocks: int, most_layers: int = 32) -> Tensor:
        """[blocks, layers, 2, 16, 8, 128] with as many layers as there is room for.

        Raises:
            ValueError: not one layer fits.
        """
        per_layer = blocks * 2 * BLOCK_TOKENS * KV_HEADS * HEAD_DIM
        layers = min(most_layers, self.memory.numel() // per_layer)
        if not layers:
            raise ValueError(f"{blocks} blocks need {per_layer * 2} bytes per layer")
        view = self.memory[: per_layer * layers]
        return view.view(blocks, layers, 2, BLOCK_TOKENS, KV_HEADS, HEAD_DIM)


def shape(group: int, heads_per_kv: int = KV_HEADS) -> AttentionShape:
    """Eight KV heads of 128, each with ``group`` query heads."""
    return AttentionShape(
        group * heads_per_kv, heads_per_kv, HEAD_DIM, BLOCK_TOKENS, HEAD_DIM**-0.5
    )


def step(lengths: list[tuple[int, int]], *, shuffled: bool = True) -> StepBatch:
    """A step of sequences given as (tokens now, tokens in the pool), their blocks in random order
    or, for the affine kernel, one after the other and each with room for the longest."""
    width = max(-(-context // BLOCK_TOKENS) for _, context in lengths)
    blocks = len(lengths) * width + 1
    order = torch.randperm(blocks - 1) if shuffled else torch.arange(blocks - 1)
    tables = (order + 1).view(len(lengths), width).to(torch.int32)
    starts = torch.tensor([0, *(queries for queries, _ in lengths)]).cumsum(0)
    positions = torch.cat([torch.arange(c - q, c) for q, c in lengths])
    rows = torch.repeat_interleave(
        torch.arange(len(lengths)), torch.tensor([q for q, _ in lengths])
    )
    slots = tables[rows, positions // BLOCK_TOKENS].long() * BLOCK_TOKENS
    slots += positions % BLOCK_TOKENS
    return StepBatch(
        tokens=torch.zeros(len(positions), dtype=torch.int32, device="cuda"),
        positions=positions.to(torch.int32).cuda(),
        slots=slots.cuda(),
        block_tables=tables.cuda(),
        query_starts=starts.to(torch.int32).cuda(),
        context_lens=torch.tensor([c for _, c in lengths], dtype=torch.int32, device="cuda"),
        logit_rows=(starts[1:] - 1).cuda(),
        max_query=max(q for q, _ in lengths),
        max_context=max(c for _, c in lengths),
    )


def blocks_of(batch: StepBatch) -> int:
    """Blocks a pool needs for ``batch``."""
    return batch.block_tables.numel() + 1


def kv_bytes(lengths: list[tuple[int, int]]) -> int:
    """Bytes of K and V that one layer reads at least."""
    return sum(c for _, c in lengths) * 2 * KV_HEADS * HEAD_DIM * 2
