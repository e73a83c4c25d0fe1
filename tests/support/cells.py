"""How many cells of llama.cpp's cache are in use: llama.cpp does not say, so the others are
filled."""

from __future__ import annotations

import numpy as np

from pagedd_daemon.backends.llama_api import SEQUENCE_IDS, Context

_SPARE = SEQUENCE_IDS - 1
"""A temporary id of the backend, empty between steps."""


def used_cells(context: Context) -> int:
    """Cells that sequences hold; nothing may be in flight."""
    filled, piece = 0, 64
    while piece:
        context.tokens[:piece] = 5
        context.positions[:piece] = np.arange(filled, filled + piece)
        context.sequences[:piece] = _SPARE
        context.wanted[:piece] = 0
        if context.decode(piece) == 0:
            filled += piece
        else:
            context.remove(_SPARE, filled)
            piece //= 2
    context.remove(_SPARE)
    return context.cells - filled
