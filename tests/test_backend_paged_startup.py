"""What happens before the paged engine serves: kernels compiled, run, captured, and timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pagedd_daemon.backends.base import ModelLoadError
from pagedd_daemon.backends.paged.early import begin_context
from pagedd_daemon.backends.paged.graphs import Graph
from pagedd_daemon.backends.paged.layout import Buckets, StepShape, decode_buckets
from pagedd_daemon.backends.paged.load import largest_that_fits
from pagedd_daemon.backends.paged.startup import LoadReport
from pagedd_daemon.backends.paged.warmup import shapes_of, warm_up
from pagedd_daemon.models.decoder import Decoder
from tests.support.driver import Driver
from tests.support.paged_backend import Plain, tiny_backend, tiny_model

BUCKETS = Buckets(decode_buckets(8), (16, 48), 8)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny_model()


class Capturer:
    """Computes a step again where a device would replay it."""

    def __init__(self) -> None:
        self.replays = 0

    def capture(self, compute: Callable[[], Tensor]) -> Graph:
        logits = compute()

        def replay() -> None:
            self.replays += 1
            logits.copy_(compute())

        return Graph(replay, logits)


@contextmanager
def cannot_compile() -> Iterator[None]:
    raise RuntimeError("no compiler")
    yield


@contextmanager
def compiles() -> Iterator[None]:
    yield


@pytest.mark.parametrize("compiling", [compiles, cannot_compile])
def test_all_buckets_are_captured_and_the_steps_replayed_from_them_are_the_plain_ones(
    model: Decoder, compiling: Callable[[], Iterator[None]]
) -> None:
    with closing(tiny_backend(model)) as backend:
        runner, capturer, report = backend._runner, Capturer(), LoadReport()
        runner._capturer = capturer
        counter = SimpleNamespace(count=5)
        warm_up(runner, backend._arena.kv, BUCKETS, report, counter, compiling())  # type: ignore[arg-type]
        assert runner.graphs == len(BUCKETS.shapes())
        assert [part.name for part in report.parts] == ["compile", "run", "graphs"]
        assert report.counters()["start_graphs"] == runner.graphs
        assert report.counters()["start_compile"] == 5
        backend._buckets = BUCKETS
        driver = Driver(backend)
        for seq, length in enumerate((40, 9, 3)):
            driver.admit(seq, list(range(5, 5 + length)))
            driver.prefill(seq)
        driver.generate(range(3), 6)
        assert capturer.replays == driver_steps(6)
        for seq in range(3):
            driver.check(seq, Plain(model).judge)


def driver_steps(generated: int) -> int:
    """Three prompts, and a step for every token after the first."""
    return 3 + generated


def test_every_shape_of_a_step_is_rehearsed_or_smaller_than_one_that_is(model: Decoder) -> None:
    with closing(tiny_backend(model)) as backend:
        shapes = shapes_of(BUCKETS, backend._runner.limits)
    assert set(BUCKETS.shapes()) <= set(shapes)
    largest = max(shape.tokens for shape in shapes)
    assert largest == backend.capabilities.max_step_tokens
    assert StepShape(largest, 1, 1, False) in shapes
    assert StepShape(largest, 256, 256, False) in shapes


def test_no_step_needs_a_kernel_that_the_first_pass_of_the_warm_up_has_not_compiled(
    tmp_path: Path,
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.rehearse_kernels"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for found in json.loads(done.stdout):
        assert found["late"] == []
        assert found["parts"]["compile"] == len(found["warm"]) > 0


def test_parts_of_a_start_are_timed_counted_and_told_in_their_order() -> None:
    times = iter([1.0, 3.5, 10.0, 10.25])
    report = LoadReport(clock=lambda: next(times))
    with report.part("weights"):
        pass
    with report.part("graphs") as part:
        part.count = 7
    assert [(p.name, p.seconds, p.count) for p in report.parts] == [
        ("weights", 2.5, 0),
        ("graphs", 0.25, 7),
    ]
    assert report.counters() == {
        "start_weights_ms": 2500,
        "start_graphs_ms": 250,
        "start_graphs": 7,
    }


def test_a_start_that_lacks_memory_makes_do_with_smaller_steps() -> None:
    tried: list[int] = []

    def prepare(tokens: int) -> str:
        tried.append(tokens)
        if tokens > 2048:
            raise torch.OutOfMemoryError("too many")
        if tokens > 1024:
            raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")
        return f"steps of {tokens}"

    assert largest_that_fits(prepare, 8192) == "steps of 1024"
    assert tried == [8192, 4096, 2048, 1024]


def test_a_start_without_memory_for_the_smallest_step_is_refused_with_the_figure() -> None:
    def prepare(tokens: int) -> None:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(ModelLoadError, match="no memory for a step of 256 tokens") as refused:
        largest_that_fits(prepare, 8192)
    assert refused.value.details == {"tokens": 256}


def test_another_error_at_the_start_is_not_taken_for_a_lack_of_memory() -> None:
    def prepare(tokens: int) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        largest_that_fits(prepare, 8192)


def test_a_context_begun_where_there_may_be_no_device_is_no_trouble() -> None:
    thread = begin_context()
    thread.join(30)
    assert not thread.is_alive()
