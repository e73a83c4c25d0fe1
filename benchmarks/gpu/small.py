"""The small kernels of a step, sampling, and the narrow matrix products of an 8B layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.pools import Arena, blocks_of, shape, step
from benchmarks.gpu.timing import compile_all, seconds
from pagedd_kernels import (
    SampleParams,
    copy_blocks,
    gated,
    linear,
    rms_norm,
    rope_write,
    sample,
)
from pagedd_kernels.gpu import linear as narrow
from pagedd_kernels.plans import LinearPlan

Row = dict[str, Any]
VOCAB, HIDDEN, FEED_FORWARD = 128256, 4096, 14336
LINEAR_SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate-up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
"""Output and input features of an 8B layer's products."""


def elementwise(arena: Arena) -> Iterable[Row]:
    """Microseconds per call, each over data that the second-level cache does not hold."""
    for tokens in (1, 8, 64, 256, 2048):
        yield {"tokens": tokens, **_elementwise(arena, tokens)}


def _elementwise(arena: Arena, tokens: int) -> Row:
    batch = step([(1, 512)] * tokens)
    kv = arena.pool(blocks_of(batch), most_layers=8)
    layers = [i % kv.shape[1] for i in range(8)]
    x = torch.randn(8, 2, tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
    weight = torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")
    head = weight[:128]
    qkv = torch.randn(8, tokens, 6144, dtype=torch.bfloat16, device="cuda")
    table = torch.rand(8192, 128, device="cuda")
    wide = torch.randn(8, tokens, 2 * FEED_FORWARD, dtype=torch.bfloat16, device="cuda")
    works: dict[str, Callable[[], object]] = {
        "rms_norm + residual": lambda: [rms_norm(a, weight, 1e-5, b) for a, b in x],
        "rope_write": lambda: [rope_write(qkv[i], table, batch, kv, i, shape(4)) for i in layers],
        "rope_write + norms": lambda: [
            rope_write(qkv[i], table, batch, kv, i, shape(4), head, head, 1e-6) for i in layers
        ],
        "gated": lambda: [gated(both, "silu") for both in wide],
    }
    return {f"{name} us": seconds(work, 8) * 1e6 for name, work in works.items()}


def block_copies(arena: Arena, ceiling: float) -> Iterable[Row]:
    """Copy-on-write: blocks of 2 MiB."""
    kv = arena.pool(4096)
    for count in (1, 4, 16, 64, 256):
        ids = torch.randperm(4095, device="cuda")[: 2 * count] + 1
        time = seconds(partial(copy_blocks, kv, ids[:count], ids[count:]))
        moved = 2 * count * kv[0].numel() * 2
        yield {"blocks": count, "us": time * 1e6, "of copy": moved / time / ceiling}


def sampling() -> Iterable[Row]:
    """Drawing from N rows of a 128,256-token vocabulary, from logits like a model's and from flat
    ones, where no small set of tokens has most of the mass."""
    for rows in (1, 16, 64, 256):
        flat = torch.randn(rows, VOCAB, device="cuda")
        peaked = flat * 2
        peaked[:, torch.randperm(VOCAB, device="cuda")[:200]] += 8 * torch.rand(200, device="cuda")
        full = torch.full((rows,), 1.0, device="cuda")
        uniform = torch.rand(rows, dtype=torch.float64, device="cuda")
        settings = {
            "greedy": SampleParams(),
            "greedy, logprobs 5": SampleParams(logprobs=5),
            "temperature": SampleParams(full, uniform),
            "top-k 40, top-p 0.95": SampleParams(
                full, uniform, top_k=(full * 40).int(), top_p=full * 0.95
            ),
            "top-p 0.9": SampleParams(full, uniform, top_p=full * 0.9),
            "min-p 0.05": SampleParams(full, uniform, min_p=full * 0.05),
        }
        for logits_name, logits in (("peaked", peaked), ("flat", flat)):
            yield {
                "rows": rows,
                "logits": logits_name,
                **{
                    f"{name} us": seconds(partial(sample, logits, params)) * 1e6
                    for name, params in settings.items()
                },
            }


def products(ceiling: float) -> Iterable[Row]:
    """cuBLAS and `pagedd_kernels.linear` for the products of one layer and the head, as a share of
    the copy bandwidth at which the weights are read."""
    for name, (features, inputs) in LINEAR_SHAPES.items():
        copies = max(2, (256 << 20) // (features * inputs * 2))
        weights = torch.randn(copies, features, inputs, dtype=torch.bfloat16, device="cuda")
        for rows in (1, 2, 4, 8, 16, 32, 64):
            x = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")
            row: Row = {"product": name, "rows": rows}
            for maker, product in (("cublas", functional.linear), ("ours", linear)):
                time = seconds(partial(_each, product, x, weights), copies)
                row[f"{maker} us"] = time * 1e6
                row[f"{maker} of copy"] = features * inputs * 2 / time / ceiling
            yield row


def _each(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Tensor) -> None:
    for weight in weights:
        product(x, weight)


def sweep_products(ceiling: float) -> Iterable[Row]:
    """Tiles of the narrow product; the fastest five of each shape, and cuBLAS."""
    forms = [
        LinearPlan(*form)
        for form in itertools.product((16, 32, 64), (64, 128, 256, 512), (2, 4, 8), (3, 5))
        if form[0] * form[1] * form[3] * 2 <= 160 << 10 and form[0] * form[1] >= 1024 * form[2]
    ]
    for (name, (features, inputs)), rows in itertools.product(LINEAR_SHAPES.items(), (1, 16)):
        copies = max(2, (256 << 20) // (features * inputs * 2))
        weights = torch.randn(copies, features, inputs, dtype=torch.bfloat16, device="cuda")
        x = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")
        compile_all([partial(narrow.linear, x, weights[0], plan) for plan in forms])
        found: list[Row] = []
        for plan in forms:
            work = partial(_each, partial(narrow.linear, plan=plan), x, weights)
            try:
                found.append({"plan": repr(plan), "us": seconds(work, copies, 10) * 1e6})
            except triton.runtime.errors.OutOfResources:
                continue
        cublas = seconds(partial(_each, functional.linear, x, weights), copies) * 1e6
        for row in sorted(found, key=lambda row: float(row["us"]))[:5]:
            share = features * inputs * 2 / float(row["us"]) * 1e6 / ceiling
            yield {"product": name, "rows": rows, **row, "of copy": share, "cublas us": cublas}
