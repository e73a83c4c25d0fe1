"""Quantised blocks of random content."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedd_daemon.models.stored import BLOCKS


def random_blocks(kind: str, count: int, seed: int) -> npt.NDArray[np.uint8]:
    """Any bits in the quantised values, and scales that are finite."""
    rng = np.random.default_rng(seed)
    _, size = BLOCKS[kind]
    blocks = rng.integers(0, 256, (count, size), np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
    halves |= dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,))
    for at in halves.get(kind, (0, 2)):
        scale = rng.normal(0, 0.05, count).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(count, 2)
    return blocks
