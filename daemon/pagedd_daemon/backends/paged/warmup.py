"""Everything a served step may launch, once, before the engine is ready.

A kernel is compiled for sizes and types and not for a layer, so a step is rehearsed with one layer
of each kind: 2 ms instead of 10 to 170 for an 8B model. That is done twice. The first time only
compiles, many kernels at once; the second one runs, which loads modules into the device, has
libraries choose their kernels and takes the memory that steps need. Graphs are captured behind it
without running anything again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from pagedd_daemon.backends.paged.caches import CompileCounter
from pagedd_daemon.backends.paged.layout import Buckets, StepShape
from pagedd_daemon.backends.paged.runner import Limits, Runner
from pagedd_daemon.backends.paged.sampling import WIDTHS, CountTable, Wanted, stage
from pagedd_daemon.backends.paged.staging import HostBuffer
from pagedd_daemon.backends.paged.startup import LoadReport
from pagedd_daemon.engine.grammar import Matcher
from pagedd_daemon.engine.sampler import Sampler
from pagedd_daemon.params import SamplingParams, StopParams
from pagedd_kernels import copy_blocks, sample

log = logging.getLogger(__name__)

_WAYS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05),
)
FLAVOURS: tuple[SamplingParams, ...] = (
    # Each with and without log-probabilities, from the model's own logits and from changed ones.
    *(replace(way, logprobs=top) for way in _WAYS for top in (-1, 5)),
    *(replace(way, logprobs=top, logit_bias={0: 1.0}) for way in _WAYS for top in (-1, 5)),
    *(replace(_WAYS[0], logit_bias=dict.fromkeys(range(width), 1.0)) for width in WIDTHS),
    replace(_WAYS[0], repetition_penalty=1.1),
    replace(_WAYS[2], typical_p=0.9),
)
"""Ways of drawing that lead to kernels of their own; `sampling.stage` leaves no others."""


def shapes_of(buckets: Buckets, limits: Limits) -> list[StepShape]:
    """The shapes to rehearse: every bucket, and steps that are larger than all of them."""
    beyond = buckets.mixed[-1] + 8 if buckets.mixed else 16
    sizes = sorted({n for n in (beyond, 2 * beyond) if n < limits.step_tokens})
    shapes = buckets.shapes()
    for tokens in (limits.step_tokens, *reversed(sizes)):
        # One sequence, two, and as many as lead to each plan of the decode kernel.
        for sequences in sorted({1, 2, 32, limits.sequences // 2, limits.sequences}):
            rows = min(sequences, tokens)
            shapes.append(StepShape(tokens, rows, rows, False))
    return shapes


class Rehearsal:
    """Computes steps of padding and draws from logits that are all alike."""

    def __init__(self, runner: Runner, kv: torch.Tensor, shapes: list[StepShape]) -> None:
        """Nothing is computed yet.

        Args:
            runner: Its input buffer is written to.
            kv: The pool; its first two blocks are, which nobody holds yet.
            shapes: Of `shapes_of`.
        """
        self._runner = runner
        self._kv = kv
        self._shapes = shapes
        self._sizes = sorted({1, min(16, runner.limits.sequences), runner.limits.sequences})
        """Draws of a step: kernels may be compiled for how the parts of a row are aligned."""

    def play(self) -> int:
        """All of it. Returns how many steps and draws there were."""
        for shape in self._shapes:
            self._runner.rehearse(shape)
        block = torch.zeros(1, dtype=torch.int64, device=self._kv.device)
        copy_blocks(self._kv, block + 1, block)
        return len(self._shapes) + self._draw()

    def _draw(self) -> int:
        runner = self._runner
        model = runner.model
        vocab, device = model.config.vocab_size, model.device
        counts = CountTable(vocab, device)
        buffer = HostBuffer(runner.limits.buffer_bytes(), pinned=device.type == "cuda")
        logits = torch.zeros(self._sizes[-1], vocab, dtype=model.dtype, device=device)
        draws = 0
        free = [_sampler(params, vocab) for params in FLAVOURS]
        for sampler in (*free, _sampler(_WAYS[0], vocab, constrained=True)):
            params = sampler.params
            for size in self._sizes:
                if params.typical_p < 1.0 and size > 16:
                    continue  # sorted by torch, which compiles nothing: 256 rows take 0.1 s
                buffer.wait()
                wanted = [Wanted(row, sampler, 0) for row in range(size)]
                staged = stage(wanted, counts, buffer.bytes, 0, _everything)
                buffer.copy_to(runner.inputs, staged.end)
                sample(logits[:size], staged.params(runner.inputs))
                draws += 1
        return draws


def _everything(_: Sequence[Matcher], words: npt.NDArray[np.int32]) -> None:
    """As if grammars let everything follow."""
    words.fill(-1)


def _sampler(params: SamplingParams, vocab: int, *, constrained: bool = False) -> Sampler:
    # As many masked ids as biases.
    stops = tuple(params.logit_bias)
    stop = StopParams(max_tokens=9, min_tokens=9 if stops else 0, stop_token_ids=stops)
    prompt = np.zeros(1, np.int32)
    eog = frozenset({0})
    matcher = cast(Matcher, _everything) if constrained else None
    return Sampler(
        params, stop, index=0, prompt=prompt, vocab_size=vocab, eog_tokens=eog, matcher=matcher
    )


@contextmanager
def _beside_each_other() -> Iterator[None]:
    """Compile what is launched within, several kernels at a time, and run nothing."""
    from pagedd_kernels.gpu.compiling import compile_only

    with compile_only():
        yield


def warm_up(
    runner: Runner,
    kv: torch.Tensor,
    buckets: Buckets,
    report: LoadReport,
    compiled: CompileCounter,
    compiling: AbstractContextManager[None] | None = None,
) -> None:
    """Compile every kernel, run it, and capture the graphs of all buckets.

    Args:
        runner: Without graphs yet.
        kv: The pool.
        buckets: What is captured.
        report: Gets the parts.
        compiled: Told of every kernel.
        compiling: In which launches only compile; `compile_only` if not given.
    """
    rehearsal = Rehearsal(runner, kv, shapes_of(buckets, runner.limits))
    with report.part("compile") as part:
        try:
            with compiling or _beside_each_other():
                rehearsal.play()
        except Exception:
            # Only a shorter way to what comes next, which compiles one by one what is missing.
            log.warning("kernels are compiled one by one", exc_info=True)
        part.count = compiled.count
    with report.part("run") as part:
        part.count = rehearsal.play()
    with report.part("graphs") as part:
        # The largest first: later graphs reuse the memory of earlier ones.
        for shape in buckets.shapes():
            runner.capture(shape)
        part.count = runner.graphs
