"""Compiling many kernels at a time, before the first of them is needed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.runtime.cache import triton_key
from triton.runtime.jit import JITFunction

_MODULES = ("blocks", "gating", "inputs", "linear", "norm", "rope", "sampling", "varlen")
THREADS = 8
"""Kernels that are compiled at the same time. Lowering and ptxas let go of the interpreter lock,
building the program out of Python does not: more threads would wait for each other."""

_FILLED: Mapping[object, Callable[..., torch.Tensor]] = {
    torch.empty: torch.zeros,
    torch.empty_like: torch.zeros_like,
}


class _Zeros(TorchFunctionMode):
    """What kernels would write is zero, not garbage: token ids must lie in the vocabulary, since
    torch's own kernels do run."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _FILLED.get(func, func)(*args, **(kwargs or {}))


def know_compiler() -> None:
    """What the first launch of a process does beside compiling; for a thread, while something else
    is read.

    Triton looks at itself, since every key of its cache holds a digest of its libraries, 470 MB;
    asks the system where the driver is; and the kernels are imported.
    """
    triton_key()
    for name in _MODULES:
        importlib.import_module(f"pagedd_kernels.gpu.{name}")
    triton.runtime.driver.active.get_current_target()


@contextmanager
def compile_only() -> Iterator[None]:
    """Within it, launching a Triton kernel compiles it for its arguments and computes nothing.

    Compiling goes on beside, `THREADS` kernels at a time (one takes 0.3 to 2 s, and a model some
    forty), and is over when the context ends. What is in Triton's cache is only read.
    """
    launch = JITFunction.run
    compile_threads = min(THREADS, len(os.sched_getaffinity(0)))

    def compile_for(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(kernel, *args, grid=grid, warmup=True, **options)

    with ThreadPoolExecutor(compile_threads, "kernels") as threads:
        JITFunction.run = compile_for
        try:
            with triton.AsyncCompileMode(threads), _Zeros():
                yield
        finally:
            JITFunction.run = launch
