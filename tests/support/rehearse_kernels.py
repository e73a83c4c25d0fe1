"""Rehearses a backend's steps as on a GPU that is not there; a program of its own.

CPU tensors are taken for CUDA's, launches find a driver of compute capability 9.0, and what Triton
would compile is only counted: after the warm-up no step may ask for another kernel. Triton must not
be in interpreter mode. Prints as JSON, for each of two models: counts of the warm-up's parts, what
it compiled, and what the steps of a random history compiled.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget

from pagedd_daemon.backends.paged import warmup
from pagedd_daemon.backends.paged.arena import PlainArena, PoolShape
from pagedd_daemon.backends.paged.graphs import Graph
from pagedd_daemon.backends.paged.layout import Buckets, StepShape, decode_buckets, layout
from pagedd_daemon.backends.paged.runner import Limits, Runner
from pagedd_daemon.backends.paged.sampling import CountTable, Wanted, stage
from pagedd_daemon.backends.paged.startup import LoadReport
from pagedd_daemon.engine.sampler import Sampler
from pagedd_daemon.models.config import Rope, uniform_attention
from pagedd_daemon.models.decoder import Decoder
from pagedd_daemon.params import SamplingParams, StopParams
from pagedd_kernels import sample
from pagedd_kernels.gpu import device
from tests.support.paged_backend import tiny_config

SEED = 11
STEPS = 150
MOST, CONTEXT, STEP_TOKENS = 256, 1024, 600
MIXED = (16, 64, 128, 256)


class Cuda(TorchFunctionMode):
    """Every tensor says that it is on a CUDA device; what no kernel writes here is zero."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        filled: dict[object, Any] = {torch.empty: torch.zeros, torch.empty_like: torch.zeros_like}
        return filled.get(func, func)(*args, **(kwargs or {}))


class Compiled:
    """Stands for a kernel that was compiled; launching it leaves everything as it is."""

    names: list[str] = []  # noqa: RUF012 -- of the whole process
    function = packed_metadata = None

    def launch_metadata(self, *_: object) -> None:
        """Nothing."""

    def run(self, *_: object) -> None:
        """Nothing."""


def compile_nothing(src: Any, **_: Any) -> Compiled:
    """What `triton.compile` is replaced with."""
    Compiled.names.append(src.fn.__name__)
    return Compiled()


class Capturer:
    """Computes what is captured, and again for every replay."""

    def capture(self, compute: Callable[[], Tensor]) -> Graph:
        """See `graphs.Capturer`."""
        before = len(Compiled.names)
        logits = compute()
        assert len(Compiled.names) == before, f"capturing compiled {Compiled.names[before:]}"
        return Graph(lambda: None, logits)


class Counter:
    """As `caches.CompileCounter`."""

    @property
    def count(self) -> int:
        """So far."""
        return len(Compiled.names)


def pretend() -> None:
    """Have Triton find a device."""
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    triton.runtime.driver.set_active(driver)
    triton.compiler.compile = compile_nothing
    device.INTERPRETED_MULTIPROCESSORS = 132


def random_steps(runner: Runner, buckets: Buckets, count: int) -> None:
    """Steps and draws as they are served, of any size."""
    rng = random.Random(SEED)
    vocab = runner.model.config.vocab_size
    counts = CountTable(vocab, runner.model.device)
    buffer = runner.inputs.numpy()
    for _ in range(count):
        tokens = rng.randint(1, rng.choice((40, STEP_TOKENS)))
        sequences = rng.randint(1, min(tokens, MOST))
        decode = sequences == tokens
        shape = buckets.fit(tokens, sequences, decode)
        if shape is None:
            shape = StepShape(tokens, sequences, rng.randint(1, sequences), False)
        where = layout(shape)
        runner._pad(where)
        logits = runner.run(where, 1 if shape.decode else rng.randint(2, max(2, tokens)))
        rows = rng.randint(1, len(logits))
        wanted = [Wanted(row, _random_sampler(rng, vocab), 0) for row in range(min(rows, 20))]
        staged = stage(wanted, counts, buffer, where.tables + 16 * rng.randint(0, 3))
        sample(logits[: len(wanted)], staged.params(runner.inputs))


def _random_sampler(rng: random.Random, vocab: int) -> Sampler:
    bias = dict.fromkeys(range(rng.choice((0, 0, 1, 9, 200))), 1.0)
    params = SamplingParams(
        temperature=rng.choice((0.0, 0.8)),
        top_k=rng.choice((0, 0, 5)),
        top_p=rng.choice((1.0, 1.0, 0.5)),
        min_p=rng.choice((0.0, 0.0, 0.1)),
        presence_penalty=rng.choice((0.0, 0.0, 0.5)),
        logprobs=rng.choice((-1, -1, 0, 4)),
        logit_bias=bias,
    )
    stop = StopParams(max_tokens=9, min_tokens=rng.choice((0, 3)), stop_token_ids=(3, 4))
    prompt = torch.zeros(1, dtype=torch.int32).numpy()
    eog = frozenset({0})
    return Sampler(params, stop, index=0, prompt=prompt, vocab_size=vocab, eog_tokens=eog)


MODELS: tuple[dict[str, object], ...] = (
    {},
    {
        "kv_heads": 1,
        "attention": uniform_attention(Rope(10_000.0, 16), [64, 0, 64, 0]),
        "attention_soft_cap": 30.0,
        "activation": "gelu_tanh",
    },
)
"""What `tiny_config` is changed by: one kind of layer, and two."""


def rehearse(changes: Mapping[str, object]) -> dict[str, object]:
    """Warm one model up, then take random steps with it."""
    dtype = torch.bfloat16
    model = Decoder.random(tiny_config(**changes), torch.device("cpu"), dtype, 1)
    config = model.config
    shape = PoolShape(config.layers, 16, config.kv_heads, config.head_dim, dtype)
    arena = PlainArena(shape, 8, model.device)
    runner = Runner(
        model, arena.kv, Limits(MOST, STEP_TOKENS, CONTEXT, 16, config.vocab_size), Capturer()
    )
    buckets = Buckets(decode_buckets(MOST), MIXED, MOST)
    report = LoadReport()
    Compiled.names.clear()
    with torch.inference_mode(), Cuda():
        warmup.warm_up(runner, arena.kv, buckets, report, Counter())  # type: ignore[arg-type]
        warm = list(Compiled.names)
        random_steps(runner, buckets, STEPS)
    parts = {part.name: part.count for part in report.parts}
    return {"parts": parts, "warm": warm, "late": Compiled.names[len(warm) :]}


def main() -> None:
    """See the module."""
    pretend()
    print(json.dumps([rehearse(changes) for changes in MODELS]))


if __name__ == "__main__":
    main()
