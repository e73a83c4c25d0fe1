"""The same functions in plain torch: what the kernels are tested against, and what runs on a CPU.

They take any floating type. float64 is computed in float64, everything else in float32 with one
rounding at the end, as the kernels do.
"""

from __future__ import annotations

from pagedd_kernels.references.attention import paged_attention
from pagedd_kernels.references.elementwise import copy_blocks, gated, rms_norm, rope_write
from pagedd_kernels.references.sampling import sample

__all__ = ["copy_blocks", "gated", "paged_attention", "rms_norm", "rope_write", "sample"]
