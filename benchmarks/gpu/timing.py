"""Times of GPU work, taken from CUDA graphs so that launching from Python is not in them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

GROUPS = 5
"""Groups of replays; the figure is the median of their means."""


def seconds(work: Callable[[], object], calls: int = 1, target_ms: float = 25.0) -> float:
    """Seconds per call, where ``work`` makes ``calls`` of them.

    Args:
        work: What is captured and replayed. It should read more than the second-level cache holds,
            or be repeated over different data, if it is to be measured as in a model.
        calls: By how much the time is divided.
        target_ms: About how long each group of replays takes.
    """
    work()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    once = _replays(graph, 1)
    count = max(1, min(1000, int(target_ms / 1e3 / max(once, 1e-6) / GROUPS)))
    result = statistics.median(_replays(graph, count) for _ in range(GROUPS)) / calls
    del graph
    return result


def _replays(graph: torch.cuda.CUDAGraph, count: int) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / count


def compile_all(jobs: list[Callable[[], object]]) -> None:
    """Run each once, side by side: nearly all of it is compiling. A plan that does not fit the
    device fails here and again where it is measured, which is where it is left out."""

    def run(job: Callable[[], object]) -> None:
        try:
            job()
        except Exception as error:
            print(f"  left out: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(run, jobs))
    torch.cuda.synchronize()


def copy_bandwidth(bytes_: int = 4 << 30) -> float:
    """Bytes per second of copying on the device, reads and writes both counted.

    By a kernel: in a graph a copy becomes a node for the copy engine, which reached 2.8 TB/s where
    kernels that only read reached 4.5.
    """
    source = torch.empty(bytes_ // 4, dtype=torch.int32, device="cuda").zero_()
    target = torch.empty_like(source)
    return 2 * bytes_ / seconds(lambda: torch.bitwise_not(source, out=target), target_ms=100)
