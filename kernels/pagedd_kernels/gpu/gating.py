"""The gate of a feed-forward layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedd_kernels.gpu.device import begin, let_next, overlap

_BLOCK = 1024


@triton.jit
def _gated(
    gate_up, out,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    let_next(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < FEATURES
    gate = tl.load(gate_up + row * 2 * FEATURES + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * FEATURES + FEATURES + at, mask=there, other=0.0)
    if GELU:
        # 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2z)), z = sqrt(2 / pi) (x + 0.044715 x^3)
        bend = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    else:
        bend = gate
    small = tl.exp(-tl.abs(bend))  # never overflows
    value = gate * tl.where(bend >= 0, 1.0, small) / (1.0 + small) * up.to(tl.float32)
    tl.store(out + row * FEATURES + at, value.to(out.dtype.element_ty), mask=there)


def gated(gate_up: Tensor, kind: str) -> Tensor:
    """`pagedd_kernels.gated`."""
    tokens, features = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, features, dtype=gate_up.dtype, device=gate_up.device)
    _gated[(tokens, triton.cdiv(features, _BLOCK))](
        gate_up,
        out,
        FEATURES=features,
        BLOCK=_BLOCK,
        GELU=kind == "gelu_tanh",
        num_warps=4,
        **overlap(gate_up.device),
    )
    return out
