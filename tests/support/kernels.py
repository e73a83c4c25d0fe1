"""Made-up steps over a paged pool, for testing kernels on any device and in any type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagedd_kernels import AttentionShape, StepBatch


@dataclass
class World:
    """A pool with some sequences in it, and a step over them."""

    kv: Tensor
    batch: StepBatch
    shape: AttentionShape
    layer: int
    q: Tensor


def shape_of(
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    block_tokens: int = 16,
    window: int = 0,
    soft_cap: float = 0.0,
) -> AttentionShape:
    return AttentionShape(heads, kv_heads, head_dim, block_tokens, head_dim**-0.5, window, soft_cap)


def world(
    shape: AttentionShape,
    lengths: Sequence[tuple[int, int]],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layers: int = 2,
    layer: int = 1,
    poison: bool = True,
    table_slack: int = 2,
) -> World:
    """Sequences of ``lengths`` (tokens of the step, tokens in the pool after it; 0 is padding).

    Blocks are handed out in random order. With ``poison`` every slot that no sequence owns is NaN,
    the padding block included.
    """
    random = torch.Generator().manual_seed(seed)
    size = shape.block_tokens
    needed = [-(-context // size) for _, context in lengths]
    blocks = sum(needed) + 3
    order = (torch.randperm(blocks - 1, generator=random) + 1).tolist()
    kv = torch.full((blocks, layers, 2, size, shape.kv_heads, shape.head_dim), torch.nan)
    if not poison:
        kv.normal_(generator=random)
    tables = torch.zeros(len(lengths), max([*needed, 1]) + table_slack, dtype=torch.int32)
    positions: list[int] = []
    slots: list[int] = []
    for row, (queries, context) in enumerate(lengths):
        mine = [order.pop() for _ in range(needed[row])]
        tables[row, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        for position in range(context):
            kv[mine[position // size], :, :, position % size].normal_(generator=random)
        for step in range(queries):
            position = context - queries + step if context else 0
            positions.append(position)
            slots.append(
                mine[position // size] * size + position % size if context else step % size
            )
    starts = torch.tensor([0, *(queries for queries, _ in lengths)]).cumsum(0)
    batch = StepBatch(
        tokens=torch.zeros(len(positions), dtype=torch.int32, device=device),
        positions=torch.tensor(positions, dtype=torch.int32, device=device),
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
        block_tables=tables.to(device),
        query_starts=starts.to(torch.int32).to(device),
        context_lens=torch.tensor([c for _, c in lengths], dtype=torch.int32, device=device),
        logit_rows=(starts[1:] - 1).to(device),
        max_query=max(queries for queries, _ in lengths),
        max_context=max(context for _, context in lengths),
    )
    q = torch.randn(len(positions), shape.heads, shape.head_dim, generator=random)
    return World(kv.to(dtype).to(device), batch, shape, layer, q.to(dtype).to(device))


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Fail unless the largest difference is within ``tolerance`` of the largest expected value."""
    assert actual.shape == expected.shape
    scale = max(1.0, float(expected.double().abs().max()))
    worst = float((actual.double().cpu() - expected.double().cpu()).abs().max())
    assert worst <= tolerance * scale, f"off by {worst:.3g} where {scale:.3g} is the largest"
