"""References of what happens to one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pagedd_kernels.batch import AttentionShape, StepBatch


def wide(x: Tensor) -> Tensor:
    """``x`` in the type that is computed in: float64 stays, all others become float32."""
    return x if x.dtype == torch.float64 else x.float()


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension of ``x``, in the type of ``x``."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, plus_one: bool
) -> tuple[Tensor, Tensor]:
    """Reference of `pagedd_kernels.rms_norm`; always returns both the norm and the sum."""
    total = x if residual is None else x + residual
    scale = wide(weight) + 1.0 if plus_one else weight
    return _normalised(wide(total), scale, eps).to(x.dtype), total


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
    """Reference of `pagedd_kernels.rope_write`."""
    heads, kv_heads = shape.heads, shape.kv_heads
    parts = qkv.view(qkv.shape[0], heads + 2 * kv_heads, shape.head_dim)
    q, k, v = torch.split(parts, [heads, kv_heads, kv_heads], dim=1)
    angles = cos_sin.to(wide(qkv).dtype)[batch.positions.long()].unsqueeze(1)
    q = _rotated(wide(q) if q_norm is None else _normalised(wide(q), q_norm, eps), angles)
    k = _rotated(wide(k) if k_norm is None else _normalised(wide(k), k_norm, eps), angles)
    block, offset = batch.slots // shape.block_tokens, batch.slots % shape.block_tokens
    kv[block, layer, 0, offset] = k.to(kv.dtype)
    kv[block, layer, 1, offset] = v.to(kv.dtype)
    return q.to(qkv.dtype)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (i, i + R/2) of the first R dimensions; the rest stays as it is."""
    rotary = angles.shape[-1]
    cos, sin = angles.chunk(2, dim=-1)
    first, second = x[..., :rotary].chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([*turned, x[..., rotary:]], dim=-1)


def gated(gate_up: Tensor, kind: str) -> Tensor:
    """Reference of `pagedd_kernels.gated`."""
    gate, up = wide(gate_up).chunk(2, dim=-1)
    if kind == "silu":
        return (functional.silu(gate) * up).to(gate_up.dtype)
    return (functional.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


def copy_blocks(kv: Tensor, src: Tensor, dst: Tensor) -> None:
    """Reference of `pagedd_kernels.copy_blocks`."""
    kv[dst] = kv[src]
