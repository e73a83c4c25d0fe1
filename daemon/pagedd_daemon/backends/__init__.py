"""Model runners behind one protocol: see `pagedd_daemon.backends.base`."""

from __future__ import annotations

import contextlib
import gc
import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pagedd_daemon.backends.base import Backend
    from pagedd_daemon.messages import Configure

__all__ = ["load_backend", "prepare"]


def prepare(backend: str) -> None:
    """Import what a backend needs, while the front reads the vocabulary: torch takes seconds.

    What is missing, or fails, is found again and reported by `load_backend`.
    """
    if backend not in ("torch", "auto"):
        return
    from pagedd_daemon.backends.paged.early import begin_context

    context = begin_context()
    with contextlib.suppress(Exception):
        import torch

        importlib.import_module("pagedd_daemon.backends.paged.load")
        if torch.cuda.is_available():
            from pagedd_daemon.backends.paged.caches import use_cache_folder

            use_cache_folder()
            from pagedd_kernels.gpu.compiling import know_compiler

            threading.Thread(target=know_compiler, name="compiler", daemon=True).start()
            context.join()
            torch.empty(1, device="cuda")
    gc.freeze()  # what torch brings: a full collection of it takes 90 ms


def _check_unchanged(configure: Configure) -> None:
    """Refuse a model that is not the one a helper has looked at: 25 ms for a header of 2 MB.

    Raises:
        ModelLoadError: It has been changed, or is a model no more.
    """
    from pagedd_daemon.backends.base import ModelLoadError
    from pagedd_daemon.models.errors import ModelError
    from pagedd_daemon.models.model import read_model_header

    try:
        digest = read_model_header(Path(configure.model_path)).digest
    except ModelError as error:
        raise ModelLoadError(error.message, error.details) from error
    if any(configure.model_digest) and digest != configure.model_digest:
        raise ModelLoadError(
            f"{configure.model_path} has changed since it was checked; load it again",
            {"path": configure.model_path},
        )


def load_backend(configure: Configure, progress: Callable[[float], None]) -> Backend:
    """Load what ``configure`` names. Only the chosen backend's libraries are imported.

    Args:
        configure: Which backend, which model, how much memory.
        progress: Called with the fraction that is done, 0 to 1.

    Raises:
        ModelLoadError: The model cannot be loaded.
    """
    if configure.backend == "simulated":
        from pagedd_daemon.backends.simulated import SimulatedBackend

        return SimulatedBackend.from_configure(configure)
    _check_unchanged(configure)
    if configure.backend == "torch":
        from pagedd_daemon.backends.paged.load import load

        return load(configure, progress)
    notice = ""
    if configure.backend == "auto":
        from pagedd_daemon.backends.paged.choice import try_cuda

        backend, notice = try_cuda(configure, progress)
        if backend is not None:
            return backend
    from pagedd_daemon.backends.llama import LlamaBackend

    return LlamaBackend.load(configure, progress, notice)
