"""Rotary embedding, the norm of query and key heads before it, and the write into the pool."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedd_kernels.batch import AttentionShape, StepBatch
from pagedd_kernels.gpu.device import begin, let_next, overlap
from pagedd_kernels.plans import power_of_two

_HEADS_PER_PROGRAM = 8


@triton.jit(
    do_not_specialize=["layer"], do_not_specialize_on_alignment=["positions", "slots", "cos_sin"]
)
def _rope_write(
    qkv,
    q,
    kv,
    cos_sin,
    positions,
    slots,
    q_norm,
    k_norm,
    layer,
    stride_block,
    stride_layer,
    stride_kv,
    stride_token,
    stride_head,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    let_next(EARLY)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, PAD)
    HALF: tl.constexpr = ROTARY // 2
    # The other of each pair is read again: it comes from the first-level cache, and so the same
    # lines serve any head size and heads that turn in part.
    pair = tl.where(dims < HALF, dims + HALF, tl.where(dims < ROTARY, dims - HALF, dims))
    is_q, is_v = head < HEADS, head >= HEADS + KV_HEADS
    valid = (head < HEADS + 2 * KV_HEADS)[:, None] & (dims < DIM)[None, :]
    at = qkv + row * ((HEADS + 2 * KV_HEADS) * DIM) + head[:, None] * DIM
    raw = tl.load(at + dims[None, :], mask=valid, other=0.0)
    x = raw.to(tl.float32)
    other = tl.load(at + pair[None, :], mask=valid, other=0.0).to(tl.float32)
    if NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / DIM + eps)
        in_dim = dims < DIM
        weight = tl.where(
            is_q[:, None],
            tl.load(q_norm + dims, mask=in_dim, other=0.0).to(tl.float32)[None, :],
            tl.load(k_norm + dims, mask=in_dim, other=0.0).to(tl.float32)[None, :],
        )
        pair_weight = tl.where(
            is_q[:, None],
            tl.load(q_norm + pair, mask=in_dim, other=0.0).to(tl.float32)[None, :],
            tl.load(k_norm + pair, mask=in_dim, other=0.0).to(tl.float32)[None, :],
        )
        x = x * inverse[:, None] * weight
        other = other * inverse[:, None] * pair_weight
    position = tl.load(positions + row).to(tl.int64)
    turning = dims < ROTARY
    angle = cos_sin + position * ROTARY + tl.where(dims < HALF, dims, dims - HALF)
    cos = tl.load(angle, mask=turning, other=1.0)
    sin = tl.load(angle + HALF, mask=turning, other=0.0)
    sin = tl.where(dims < HALF, -sin, sin)
    turned = (x * cos[None, :] + other * sin[None, :]).to(raw.dtype)
    value = tl.where(is_v[:, None], raw, turned)
    q_at = q + row * (HEADS * DIM) + head[:, None] * DIM + dims[None, :]
    tl.store(q_at, value, mask=valid & is_q[:, None])
    slot = tl.load(slots + row)
    kv_head = tl.where(is_v, head - HEADS - KV_HEADS, head - HEADS)
    place = kv + (slot // BLOCK_TOKENS) * stride_block + (slot % BLOCK_TOKENS) * stride_token
    place = place + layer.to(tl.int64) * stride_layer
    which = tl.where(is_v, stride_kv, 0) + kv_head * stride_head
    kv_at = place + which[:, None] + dims[None, :]
    tl.store(kv_at, value.to(kv.dtype.element_ty), mask=valid & (head >= HEADS)[:, None])


def rope_write(
    qkv: Tensor,
    cos_sin: Tensor,
    batch: StepBatch,
    kv: Tensor,
    layer: int,
    shape: AttentionShape,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """`pagedd_kernels.rope_write`."""
    tokens, heads = qkv.shape[0], shape.heads + 2 * shape.kv_heads
    q = torch.empty(tokens, shape.heads, shape.head_dim, dtype=qkv.dtype, device=qkv.device)
    block = min(_HEADS_PER_PROGRAM, power_of_two(heads))
    _rope_write[(tokens, triton.cdiv(heads, block))](
        qkv,
        q,
        kv,
        cos_sin,
        batch.positions,
        batch.slots,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        layer,
        *kv.stride()[:5],
        eps,
        HEADS=shape.heads,
        KV_HEADS=shape.kv_heads,
        DIM=shape.head_dim,
        PAD=power_of_two(shape.head_dim),
        ROTARY=cos_sin.shape[1],
        BLOCK_TOKENS=shape.block_tokens,
        NORM=q_norm is not None,
        BLOCK=block,
        num_warps=4,
        **overlap(qkv.device),
    )
    return q
