"""RMS norm, with the residual addition before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedd_kernels.gpu.device import begin, let_next, overlap
from pagedd_kernels.plans import power_of_two


@triton.jit
def _rms_norm(
    x,
    residual,
    weight,
    out,
    total,
    eps,
    FEATURES: tl.constexpr,
    PAD: tl.constexpr,
    ADD: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    let_next(EARLY)
    row = tl.program_id(0).to(tl.int64) * FEATURES
    at = tl.arange(0, PAD)
    there = at < FEATURES
    scale = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    value = tl.load(x + row + at, mask=there, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row + at, mask=there, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row + at, rounded, mask=there)
        value = rounded.to(tl.float32)
    if PLUS_ONE:
        scale += 1.0
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 0) / FEATURES + eps)
    tl.store(out + row + at, (value * inverse * scale).to(out.dtype.element_ty), mask=there)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, plus_one: bool
) -> tuple[Tensor, Tensor]:
    """`pagedd_kernels.rms_norm`; always returns both the norm and the sum."""
    features = x.shape[-1]
    pad = power_of_two(features)
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    _rms_norm[(x.numel() // features,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        total,
        eps,
        FEATURES=features,
        PAD=pad,
        ADD=residual is not None,
        PLUS_ONE=plus_one,
        num_warps=min(16, max(1, pad // 512)),
        **overlap(x.device),
    )
    return out, total
