"""llama.cpp alone: one sequence, one context, no pager."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from pagedd_daemon.backends.llama_api import Context, ContextOptions, Model


class PlainLlama:
    """What everything else must agree with: F32 keys and values, no flash attention."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.model = Model(str(path), lambda _: None)
        self.context = Context(self.model, ContextOptions(2048, 512, threads, "f32", False))

    def logits(self, text: list[int]) -> npt.NDArray[np.float32]:
        """Logits after every token of a text."""
        context, rows = self.context, []
        context.remove(0)
        for start in range(0, len(text), 512):
            part = text[start : start + 512]
            n = len(part)
            context.tokens[:n] = part
            context.positions[:n] = np.arange(start, start + n)
            context.sequences[:n] = 0
            context.wanted[:n] = 1
            assert context.decode(n) == 0
            rows.append(context.logits(n).copy())
        return np.concatenate(rows)

    def close(self) -> None:
        """Free context and model."""
        self.context.close()
        self.model.close()
