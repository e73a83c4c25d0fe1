"""Whether a model is served on the GPU, where the person at the machine left it open."""

from __future__ import annotations

import logging
from collections.abc import Callable

from pagedd_daemon.backends.base import Backend, ModelLoadError
from pagedd_daemon.messages import Configure

log = logging.getLogger(__name__)


def try_cuda(configure: Configure, progress: Callable[[float], None]) -> tuple[Backend | None, str]:
    """The model on the CUDA device, or why it is not there.

    What cannot be helped by another backend (a broken file) will be found by llama.cpp again and
    reported there.
    """
    try:
        import torch
    except ImportError as error:
        return None, f"A GPU is present, but not used: {error}. Computing on the CPU."
    if not torch.cuda.is_available():
        return None, (
            "A GPU is present, but not used: torch finds no CUDA device (is it a build for the "
            "CPU, or the driver too old?). Computing on the CPU."
        )
    from pagedd_daemon.backends.paged.load import load

    try:
        return load(configure, progress), ""
    except ModelLoadError as error:
        log.warning("not on the GPU: %s", error)
        return None, f"The GPU is not used for this model: {error}. Computing on the CPU."
