"""Products of a few rows with a large matrix, which read it once and do little else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedd_kernels.gpu.device import begin, overlap
from pagedd_kernels.plans import ROWS, LinearPlan, ceil_div, power_of_two


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x,
    weight,
    out,
    rows,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    feature = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inputs = tl.arange(0, STEP)
    there = row < rows
    known = feature < FEATURES
    x_at = x + row[:, None] * INPUTS + inputs[None, :]
    w_at = weight + feature.to(tl.int64)[None, :] * INPUTS + inputs[:, None]
    begin(EARLY)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, INPUTS, STEP):
        if INPUTS % STEP == 0:
            a = tl.load(x_at + first, mask=there[:, None], other=0.0)
            b = tl.load(w_at + first, mask=known[None, :], other=0.0)
        else:
            inside = first + inputs < INPUTS
            a = tl.load(x_at + first, mask=there[:, None] & inside[None, :], other=0.0)
            b = tl.load(w_at + first, mask=known[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    at = out + row.to(tl.int64)[:, None] * FEATURES + feature[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=there[:, None] & known[None, :])


def linear(x: Tensor, weight: Tensor, plan: LinearPlan) -> Tensor:
    """`pagedd_kernels.linear` as ``plan`` says.

    Args:
        x: [M, K], contiguous.
        weight: [N, K], contiguous, of the same type.
        plan: Sizes of the tiles.

    Returns:
        [M, N].
    """
    rows, inputs = x.shape
    features = weight.shape[0]
    out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    _linear[(ceil_div(features, plan.block),)](
        x,
        weight,
        out,
        rows,
        FEATURES=features,
        INPUTS=inputs,
        ROWS=max(ROWS, power_of_two(rows)),
        BLOCK=plan.block,
        STEP=plan.step,
        num_warps=plan.warps,
        num_stages=plan.stages,
        **overlap(x.device),
    )
    return out
