"""Triton kernels over the paged KV pool, each beside a torch reference."""

from __future__ import annotations

from pagedd_kernels.batch import AttentionShape, StepBatch
from pagedd_kernels.ops import (
    copy_blocks,
    gated,
    linear,
    paged_attention,
    rms_norm,
    rope_write,
    sample,
)
from pagedd_kernels.params import Penalties, Sampled, SampleParams, fill_counts

__all__ = [
    "AttentionShape",
    "Penalties",
    "SampleParams",
    "Sampled",
    "StepBatch",
    "copy_blocks",
    "fill_counts",
    "gated",
    "linear",
    "paged_attention",
    "rms_norm",
    "rope_write",
    "sample",
]
