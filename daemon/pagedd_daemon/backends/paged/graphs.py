"""Steps as CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pagedd_daemon.backends.paged.device_memory import borrowed


@dataclass(frozen=True, slots=True)
class Graph:
    """A step that can be computed again with one call."""

    replay: Callable[[], None]
    logits: Tensor
    """What a replay leaves there, until another graph is replayed."""


class Capturer(Protocol):
    """Makes graphs of what is computed."""

    def capture(self, compute: Callable[[], Tensor]) -> Graph:
        """The graph of ``compute``, every kernel of which has run before."""
        ...


class CudaCapturer:
    """CUDA graphs that share one pool of scratch memory.

    Only one runs at a time, and whatever it leaves behind is used before the next one starts:
    everything is on one stream.
    """

    def __init__(self) -> None:
        """Nothing is captured yet."""
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, compute: Callable[[], Tensor]) -> Graph:
        """See `Capturer`; on the current stream, which must not be the default one."""
        graph = torch.cuda.CUDAGraph()
        # Other threads copy and page-lock meanwhile, which does not concern this capture.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            logits = compute()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # that nothing whole was captured
                graph.capture_end()
            raise
        graph.capture_end()
        # Logits of all buckets would be more than a gigabyte. Their memory is the pool's, and the
        # next graph may have it: whoever draws from them does so before that one runs.
        return Graph(graph.replay, borrowed(logits))
