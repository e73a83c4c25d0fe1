"""What every kernel must do, as checks that take a device and a type.

The tests run them in Triton's interpreter, the GPU tests and the kernel benchmark on a GPU. Nothing
but torch and the kernels is imported, so they also run where nothing else is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional

from pagedd_kernels import AttentionShape, Penalties, SampleParams, paged_attention, references
from pagedd_kernels.gpu import blocks, gating, linear, norm, rope
from pagedd_kernels.gpu import sampling as sampler
from pagedd_kernels.gpu.decode import decode_attention
from pagedd_kernels.gpu.varlen import varlen_attention
from pagedd_kernels.plans import DecodePlan, LinearPlan, VarlenPlan
from tests.support.kernels import World, close, shape_of, world

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of the largest expected value: rounding of the inputs is the same on both sides, that of
probabilities and results is not."""

SHAPES = {
    "group 1": shape_of(2, 2, 64),
    "group 3": shape_of(6, 2, 64),
    "group 4, 128": shape_of(8, 2, 128),
    "group 7": shape_of(7, 1, 32),
    "group 8, window 24": shape_of(8, 1, 64, window=24),
    "group 20": shape_of(20, 1, 16),
    "head 80": shape_of(4, 2, 80),
    "head 96, window 40, cap 2": shape_of(4, 4, 96, window=40, soft_cap=2.0),
    "head 256, cap 5": shape_of(4, 2, 256, soft_cap=5.0),
    "blocks of 32": shape_of(4, 2, 32, block_tokens=32),
}
DECODING = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 0), (1, 64), (1, 130)]
"""One token each: the first, block edges, tile edges, padding, several parts."""
MIXED = [(1, 1), (1, 70), (5, 5), (16, 16), (3, 0), (17, 50), (1, 0), (9, 99), (20, 20)]
"""Single tokens, whole prompts, chunks with a past, padding of both kinds."""


@dataclass(frozen=True)
class Target:
    """Where a check runs."""

    device: str
    dtype: torch.dtype

    def world(self, shape: AttentionShape, lengths: list[tuple[int, int]], seed: int = 0) -> World:
        return world(shape, lengths, seed=seed, dtype=self.dtype, device=self.device)

    def random(self, *size: int, seed: int = 0) -> torch.Tensor:
        values = torch.randn(*size, generator=torch.Generator().manual_seed(seed))
        return values.to(self.dtype).to(self.device)

    def close(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert actual.dtype == expected.dtype
        close(actual, expected, TOLERANCE[self.dtype])


def _expected(w: World) -> torch.Tensor:
    return references.paged_attention(w.q, w.kv, w.layer, w.batch, w.shape)


def decode(target: Target, shape: AttentionShape) -> None:
    """Single tokens, in one part, in a few, and in as many as the plan takes."""
    w = target.world(shape, DECODING)
    expected = _expected(w)
    tile = 32 if shape.head_dim > 128 else 64
    plans = [
        DecodePlan(tile, warps=2, stages=2, spare=0, min_chunk=tile),
        DecodePlan(32, warps=2, stages=2, spare=6, min_chunk=32),
    ]
    for plan in plans if target.device == "cpu" else [None, *plans]:
        out = torch.full_like(w.q, torch.nan)
        target.close(decode_attention(w.q, w.kv, 1, w.batch, shape, out, plan), expected)
    few = target.world(shape, [(1, 300), (1, 17)])
    target.close(decode_attention(few.q, few.kv, 1, few.batch, shape), _expected(few))


def varlen(target: Target, shape: AttentionShape) -> None:
    """A mixed step, as planned and with the keys in parts."""
    w = target.world(shape, MIXED)
    expected = _expected(w)
    rows = 32 if shape.group > 16 else 16
    plans = [
        VarlenPlan(64, 32, warps=4, stages=2, splits=1, min_chunk=32),
        VarlenPlan(rows, 32, warps=2, stages=2, splits=3, min_chunk=32),
    ]
    # The interpreter is slow, and to it a plan is only another set of sizes.
    for plan in plans if target.device == "cpu" else [None, *plans]:
        target.close(varlen_attention(w.q, w.kv, 1, w.batch, shape, plan), expected)


def one_sequence(target: Target, shape: AttentionShape) -> None:
    """The only sequence of a step may have any number of tokens, also behind a found prefix."""
    for queries, context in ((40, 40), (3, 130), (16, 256), (1, 300), (4, 0)):
        w = target.world(shape, [(queries, context)])
        w.batch.max_query = max(2, queries)
        target.close(varlen_attention(w.q, w.kv, 1, w.batch, shape), _expected(w))


def rope_and_write(target: Target, shape: AttentionShape, rotary: int, norms: bool) -> None:
    """Q as the reference has it, K and V in their slots, and every other slot untouched."""
    w = target.world(shape, MIXED)
    heads, dim = shape.heads + 2 * shape.kv_heads, shape.head_dim
    qkv = target.random(w.q.shape[0], heads * dim, seed=1)
    angles = torch.rand(300, rotary // 2, generator=torch.Generator().manual_seed(2)) * 6
    table = torch.cat([angles.cos(), angles.sin()], 1).to(target.device)
    q_norm, k_norm = (target.random(dim, seed=s) if norms else None for s in (3, 4))
    kv = w.kv.clone()
    q = rope.rope_write(qkv, table, w.batch, kv, 1, shape, q_norm, k_norm, 1e-6)
    expected = references.rope_write(qkv, table, w.batch, w.kv, 1, shape, q_norm, k_norm, 1e-6)
    target.close(q, expected)
    # Padding rows of several sequences share slots of the padding block: any of them may win.
    target.close(kv[1:].nan_to_num(7.0), w.kv[1:].nan_to_num(7.0))


def norms(target: Target, features: int) -> None:
    """With and without the residual, and Gemma's weights."""
    x, residual = target.random(5, features, seed=1), target.random(5, features, seed=2)
    weight = target.random(features, seed=3)
    for plus_one in (False, True):
        out, _ = norm.rms_norm(x, weight, 1e-5, None, plus_one)
        target.close(out, references.rms_norm(x, weight, 1e-5, None, plus_one)[0])
        out, total = norm.rms_norm(x, weight.float(), 1e-5, residual, plus_one)
        expected, expected_total = references.rms_norm(x, weight, 1e-5, residual, plus_one)
        assert torch.equal(total, expected_total)
        target.close(out, expected)


def gates(target: Target, features: int) -> None:
    """Both activations, also far from zero."""
    x = target.random(5, 2 * features) * 8
    for kind in ("silu", "gelu_tanh"):
        target.close(gating.gated(x, kind), references.gated(x, kind))


def copies(target: Target) -> None:
    """Bit for bit, NaN included."""
    w = target.world(shape_of(4, 2, 64), [(1, 200)])
    src = torch.tensor([1, 3, 4], device=target.device)
    dst = torch.tensor([5, 2, 6], device=target.device)
    kv = w.kv.clone()
    blocks.copy_blocks(kv, src, dst)
    references.copy_blocks(w.kv, src, dst)
    assert torch.equal(kv.view(torch.int16), w.kv.view(torch.int16))


def narrow_products(target: Target) -> None:
    """Sizes that no tile divides, and one that all do."""
    for rows, features, inputs in ((1, 100, 96), (5, 64, 128), (16, 40, 200), (19, 33, 64)):
        x = target.random(rows, inputs, seed=1)
        weight = target.random(features, inputs, seed=2)
        for plan in (LinearPlan(16, 64, warps=2, stages=3), LinearPlan(32, 32, warps=2, stages=2)):
            out = linear.linear(x, weight, plan)
            target.close(out, functional.linear(x.float(), weight.float()).to(target.dtype))


def sampling(target: Target, vocab: int, spread: float, rows: int = 12) -> None:
    """The tokens that sorting the whole row gives, for every filter, flat and peaked logits."""
    random = torch.Generator().manual_seed(int(spread * 10))
    logits = (torch.randn(rows, vocab, generator=random) * spread * 4).round() / 4  # many ties
    logits[1] = 0.25  # all equal
    # The interpreter is slow, and narrowing 3e38 takes it forty passes.
    far = -3e3 if target.device == "cpu" else -3e38
    logits[2, :3] = torch.tensor([far, 40.0, -torch.inf])
    logits[3, vocab // 2] = torch.nan
    logits[4] = -torch.inf
    uniform = torch.rand(rows, dtype=torch.float64, generator=random)
    uniform[5:7] = torch.tensor([0.0, 1 - 2.0**-53])
    logits, uniform = logits.to(target.device), uniform.to(target.device)
    one = torch.linspace(0.5, 1.5, rows).to(target.device)
    some = torch.arange(rows, device=target.device) % 3
    hot = SampleParams(one * (some > 0), uniform, logprobs=3)
    tenth = (one * vocab / 10).int()
    for params in (
        SampleParams(logprobs=0),
        hot,
        replace(hot, top_k=some.int() * 20, min_p=one * 0.02),
        replace(hot, top_k=tenth, top_p=one.clamp(max=1.0) * 0.9),
        replace(hot, top_p=(one - 0.5).clamp(max=1.0), min_p=one * 0.001 * some),
    ):
        got, expected = sampler.sample(logits, params), references.sample(logits, params)
        assert got.tokens.tolist() == expected.tokens.tolist(), params
        sound = expected.tokens >= 0
        assert got.logprobs is not None
        assert expected.logprobs is not None
        close(got.logprobs[sound], expected.logprobs[sound], 1e-5)
        if got.top_tokens is not None and expected.top_tokens is not None:
            assert torch.equal(got.top_tokens[sound], expected.top_tokens[sound])


def _words(vocab: int, random: torch.Generator) -> torch.Tensor:
    """Four lines of bits, of which about half are set, the sign bits too."""
    size = (4, -(-vocab // 32))
    return torch.randint(-(2**31), 2**31, size, generator=random).to(torch.int32)


def adjusted(target: Target, vocab: int = 700) -> None:
    """Bias, penalties and masks change logits as the reference does, and counts follow."""
    rows = 6
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(rows, vocab, generator=random).to(target.device)
    column = torch.linspace(0.5, 1.5, rows, device=target.device)
    counts = torch.randint(0, 4, (4, vocab), generator=random, dtype=torch.int32)
    counts = counts.to(target.device)
    table = torch.tensor([0, -1, 2, 3, -1, 1], dtype=torch.int32, device=target.device)
    ids = torch.tensor([[0, 5, -1]] * rows, dtype=torch.int32, device=target.device)
    params = SampleParams(
        penalties=Penalties(table, counts, column, column * 0.3, column * 0.2),
        bias=(ids, torch.tensor([[2.0, -1.0, 0.0]] * rows, device=target.device)),
        masked=torch.tensor([[7, -1]] * rows, dtype=torch.int32, device=target.device),
        allowed=(table.flip(0), _words(vocab, random).to(target.device)),
    )
    kept = logits.clone()
    close(
        sampler.adjust(logits, params).clamp(min=-9),
        references.sampling.adjust(logits, params).clamp(min=-9),
        1e-6,
    )
    before = counts.clone()
    tokens = sampler.sample(logits, params).tokens
    assert torch.equal(logits, kept)
    for row, slot in enumerate(table.tolist()):
        if slot >= 0:
            before[slot, int(tokens[row])] += 2
    assert torch.equal(counts, before)


def checks(target: Target) -> dict[str, Callable[[], None]]:
    """Every check by name."""
    found: dict[str, Callable[[], None]] = {}
    for name, shape in SHAPES.items():
        found[f"decode, {name}"] = partial(decode, target, shape)
        found[f"varlen, {name}"] = partial(varlen, target, shape)
    found["one sequence"] = partial(one_sequence, target, SHAPES["group 4, 128"])
    found["one sequence, window"] = partial(one_sequence, target, SHAPES["group 8, window 24"])
    small = replace(SHAPES["head 80"], block_tokens=8)
    for norm_heads in (False, True):
        tag = ", norms" if norm_heads else ""
        whole = partial(rope_and_write, target, SHAPES["group 4, 128"], 128, norm_heads)
        found[f"rope{tag}"] = whole
        found[f"rope of a part{tag}"] = partial(rope_and_write, target, small, 32, norm_heads)
    for features in (96, 4096, 5376):
        found[f"rms norm, {features}"] = partial(norms, target, features)
    for features in (96, 1536, 14336):
        found[f"gate, {features}"] = partial(gates, target, features)
    found["block copies"] = partial(copies, target)
    found["narrow products"] = partial(narrow_products, target)
    found["bias, penalties, masks"] = partial(adjusted, target)
    return found


def graph_replay(target: Target) -> None:
    """A captured graph follows tables, starts and lengths that change between replays."""
    shape = SHAPES["group 4, 128"]
    for lengths in (DECODING, MIXED):
        worlds = [target.world(shape, case, seed=1) for case in (lengths, lengths[::-1])]
        q, kv, batch = worlds[0].q.clone(), worlds[0].kv.clone(), worlds[0].batch
        fixed = replace(
            batch,
            block_tables=batch.block_tables.clone(),
            query_starts=batch.query_starts.clone(),
            context_lens=batch.context_lens.clone(),
            max_context=4096,  # a graph is captured for the longest there may be
        )
        paged_attention(q, kv, 1, fixed, shape)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = paged_attention(q, kv, 1, fixed, shape)
        for w in (*worlds, *worlds):
            q.copy_(w.q)
            kv.copy_(w.kv)
            fixed.block_tables.copy_(w.batch.block_tables)
            fixed.query_starts.copy_(w.batch.query_starts)
            fixed.context_lens.copy_(w.batch.context_lens)
            graph.replay()
            target.close(out, _expected(w))


def gpu_checks(target: Target) -> dict[str, Callable[[], None]]:
    """What only a GPU can do, or do in time."""
    found: dict[str, Callable[[], None]] = {}
    for vocab in (700, 32000, 128256):
        for spread in (0.3, 3.0):
            found[f"sampling, {vocab} x {spread}"] = partial(sampling, target, vocab, spread)
    found["sampling of many rows"] = partial(sampling, target, 32000, 1.0, rows=80)
    return found


def lone_checks(target: Target) -> dict[str, Callable[[], None]]:
    """What must be alone on the GPU: during a capture nobody else may allocate."""
    return {"graph replay": partial(graph_replay, target)}
