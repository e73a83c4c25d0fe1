"""What launchers need to know of the device."""

from __future__ import annotations

from functools import cache

import torch

INTERPRETED_MULTIPROCESSORS = 8
"""Few, so that Triton's interpreter, which runs programs one after the other, gets few splits."""


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a fixed number for the interpreter's CPU tensors."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
