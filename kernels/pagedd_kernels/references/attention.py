"""Reference of attention over the paged pool: one sequence after the other, nothing clever."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedd_kernels.batch import AttentionShape, StepBatch
from pagedd_kernels.references.elementwise import wide


def paged_attention(
    q: Tensor, kv: Tensor, layer: int, batch: StepBatch, shape: AttentionShape
) -> Tensor:
    """Reference of `pagedd_kernels.paged_attention`. Reads lengths back, so it is for tests and
    the CPU only."""
    out = torch.zeros_like(q)
    starts = batch.query_starts.tolist()
    for row, context in enumerate(batch.context_lens.tolist()):
        first, end = starts[row], starts[row + 1]
        if context and end > first:
            blocks = -(-context // shape.block_tokens)
            pages = kv[batch.block_tables[row, :blocks].long(), layer]
            k = pages[:, 0].flatten(0, 1)[:context]
            v = pages[:, 1].flatten(0, 1)[:context]
            out[first:end] = _attend(wide(q[first:end]), wide(k), wide(v), shape).to(q.dtype)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape) -> Tensor:
    """The last ``len(q)`` of ``len(k)`` positions look back.

    Args:
        q: [Q, H, D].
        k, v: [C, K, D] with C >= Q; head h of q looks at head h // (H // K).
    """
    queries, context = q.shape[0], k.shape[0]
    grouped = q.view(queries, shape.kv_heads, shape.group, shape.head_dim)
    # As batched products over KV heads; an einsum would say the same and cost a CPU twice as much.
    rows = grouped.permute(1, 2, 0, 3).reshape(shape.kv_heads, -1, shape.head_dim)
    scores = torch.bmm(rows, k.permute(1, 2, 0)) * shape.scale
    if shape.soft_cap:
        scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
    if queries > 1 or shape.window:
        position = torch.arange(context - queries, context, device=q.device).unsqueeze(1)
        key = torch.arange(context, device=q.device)
        hidden = key > position
        if shape.window:
            hidden |= position - key >= shape.window
        scores = scores.view(shape.kv_heads, shape.group, queries, context)
        scores = scores.masked_fill(hidden, -torch.inf).flatten(1, 2)
    out = torch.bmm(scores.softmax(-1), v.transpose(0, 1))
    out = out.view(shape.kv_heads, shape.group, queries, shape.head_dim)
    return out.permute(2, 0, 1, 3).reshape(queries, shape.heads, shape.head_dim)
