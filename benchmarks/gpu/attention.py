"""Attention on a GPU: the decode grid, paged against affine and torch's, prefill, tuning sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.pools import HEAD_DIM, KV_HEADS, Arena, blocks_of, kv_bytes, shape, step
from benchmarks.gpu.timing import compile_all, seconds
from pagedd_kernels import StepBatch
from pagedd_kernels.gpu.decode import decode_attention
from pagedd_kernels.gpu.device import multiprocessors
from pagedd_kernels.gpu.varlen import varlen_attention
from pagedd_kernels.plans import DecodePlan, VarlenPlan, decode_plan, varlen_plan

Row = dict[str, Any]
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 512, 2048, 8192, 32768)
GROUPS = (1, 2, 4, 8)
PREFILLS = {"8 x 512": [(512, 512)] * 8, "1 x 6000": [(6000, 6000)]}
MIXED = {
    "prefix hit, 16 of 6000": [(16, 6000)],
    "prefix hit, 1 of 6000": [(1, 6000)],
    "chunk, 512 of 8192": [(512, 8192)],
    "31 decode at 600 + prompt of 512": [(1, 600)] * 31 + [(512, 512)],
    "255 decode at 600 + chunk of 256": [(1, 600)] * 255 + [(256, 256)],
}


def _queries(batch: StepBatch, group: int) -> Tensor:
    return torch.randn(
        batch.num_tokens, group * KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda"
    )


def _decode_time(
    arena: Arena,
    lengths: list[tuple[int, int]],
    group: int = 4,
    plan: DecodePlan | None = None,
    affine: bool = False,
    target_ms: float = 25.0,
) -> float:
    batch = step(lengths, shuffled=not affine)
    kv = arena.pool(blocks_of(batch))
    q = _queries(batch, group)

    def layers() -> None:
        for layer in range(kv.shape[1]):
            decode_attention(q, kv, layer, batch, shape(group), plan=plan, affine=affine)

    return seconds(layers, kv.shape[1], target_ms)


def decode_grid(arena: Arena, ceiling: float) -> Iterable[Row]:
    """Batch x context x group, each with its share of the copy bandwidth."""
    for batch, context, group in product(BATCHES, CONTEXTS, GROUPS):
        if group != 4 and (batch not in (1, 8, 64, 256) or context not in (512, 8192)):
            continue
        lengths = [(1, context)] * batch
        if kv_bytes(lengths) > arena.memory.numel() * 2 * 0.99:
            continue
        time = _decode_time(arena, lengths, group)
        rate = kv_bytes(lengths) / time
        yield {
            "batch": batch, "context": context, "group": group, "us": time * 1e6,
            "TB/s": rate / 1e12, "of copy": rate / ceiling,
        }  # fmt: skip


def ragged(arena: Arena, ceiling: float) -> Iterable[Row]:
    """One long sequence among short ones, and a spread of lengths as in traffic."""
    cases = {
        "1 x 32768 + 31 x 512": [(1, 32768)] + [(1, 512)] * 31,
        "1 x 32768 + 127 x 512": [(1, 32768)] + [(1, 512)] * 127,
        "64 x 64..4096": [(1, 64 * (i + 1)) for i in range(64)],
        "256 x 16..1024": [(1, 4 * (i + 4)) for i in range(256)],
    }
    for name, lengths in cases.items():
        time = _decode_time(arena, lengths)
        rate = kv_bytes(lengths) / time
        yield {"lengths": name, "us": time * 1e6, "of copy": rate / ceiling}


def every_length(arena: Arena) -> Iterable[Row]:
    """Batch 1 at every 16th context to 2,048 in one plan: no step may stand out."""
    batch = step([(1, 2048)])
    kv = arena.pool(blocks_of(batch), most_layers=8)
    q = _queries(batch, 4)

    def layers() -> None:
        for layer in range(8):
            decode_attention(q, kv, layer, batch, shape(4))

    times: list[float] = []
    for context in range(16, 2049, 16):
        batch.context_lens.fill_(context)
        times.append(seconds(layers, 8, target_ms=2) * 1e6)
    worst = max(
        times[i] / sorted(times[max(0, i - 4) : i + 5])[len(times[max(0, i - 4) : i + 5]) // 2]
        for i in range(len(times))
    )
    yield {"first us": times[0], "last us": times[-1], "worst over neighbours": worst}


def against_others(arena: Arena) -> Iterable[Row]:
    """The paged kernel, the same kernel with affine addresses, and torch's on contiguous KV."""
    for count, context in ((1, 2048), (1, 32768), (8, 2048), (32, 2048), (64, 1024), (128, 4096)):
        lengths = [(1, context)] * count
        paged = min(_decode_time(arena, lengths) for _ in range(2))
        affine = min(_decode_time(arena, lengths, affine=True) for _ in range(2))
        q = torch.randn(count, 32, 1, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        k, v = torch.randn(
            2, count, KV_HEADS, context, HEAD_DIM, dtype=torch.bfloat16, device="cuda"
        )
        row: Row = {
            "batch": count,
            "context": context,
            "us": paged * 1e6,
            "affine us": affine * 1e6,
        }
        row["paged/affine"] = paged / affine
        row["sdpa us"] = _best_sdpa(q, k, v, causal=False)[1]
        yield row


def _best_sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[str, float]:
    """The fastest of torch's implementations that takes this, and its microseconds."""
    found: list[tuple[float, str]] = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):

        def work() -> None:
            functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        try:
            with sdpa_kernel(backend):
                found.append((seconds(work) * 1e6, str(backend).rpartition(".")[2]))
        except RuntimeError as error:
            print(f"  {backend}: {str(error).splitlines()[0]}", flush=True)
    best = min(found, default=(float("nan"), "none"))
    return best[1], best[0]


def _prefill_time(
    arena: Arena,
    lengths: list[tuple[int, int]],
    plan: VarlenPlan | None = None,
    layers: int = 4,
    affine: bool = False,
) -> float:
    batch = step(lengths, shuffled=not affine)
    kv = arena.pool(blocks_of(batch), most_layers=layers)
    q = _queries(batch, 4)

    def work() -> None:
        for layer in range(layers):
            varlen_attention(q, kv, layer, batch, shape(4), plan, affine=affine)

    return seconds(work, layers)


def _flops(lengths: list[tuple[int, int]]) -> float:
    pairs = sum(q * (c - q) + q * (q + 1) / 2 for q, c in lengths)
    return 4 * pairs * 32 * HEAD_DIM


def prefill(arena: Arena) -> Iterable[Row]:
    """Whole prompts beside torch's attention, then chunks, prefix hits and mixed steps."""
    for name, lengths in (PREFILLS | MIXED).items():
        time = _prefill_time(arena, lengths)
        row: Row = {"step": name, "us": time * 1e6, "32 layers ms": time * 32e3}
        row["TFLOP/s"] = _flops(lengths) / time / 1e12
        if name in PREFILLS:
            row["affine us"] = _prefill_time(arena, lengths, affine=True) * 1e6
            count, context = len(lengths), lengths[0][0]
            q = torch.randn(count, 32, context, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
            k, v = torch.randn(
                2, count, KV_HEADS, context, HEAD_DIM, dtype=torch.bfloat16, device="cuda"
            )
            row["sdpa"], row["sdpa us"] = _best_sdpa(q, k, v, causal=True)
        yield row


def sweep_decode(arena: Arena, ceiling: float) -> Iterable[Row]:
    """Tiles, warps, stages, splits; the fastest ten of each shape, and what the plan takes."""
    forms = list(product((32, 64, 128), (1, 2, 4), (2, 3, 4, 5)))
    tiny = step([(1, 64)])
    kv = arena.pool(blocks_of(tiny), most_layers=1)
    q = _queries(tiny, 4)
    compile_all(
        [
            partial(decode_attention, q, kv, 0, tiny, shape(4), plan=DecodePlan(t, w, s, n, 64))
            for (t, w, s), n in product(forms, (0, 2))
        ]
    )
    cases = {
        (1, 2048): (8, 16, 32), (1, 32768): (32, 64, 82, 128), (8, 2048): (2, 4, 8, 16),
        (8, 8192): (4, 8, 10, 16), (32, 2048): (1, 2, 3, 4), (64, 1024): (1, 2), (256, 576): (1,),
        (128, 4096): (1, 2),
    }  # fmt: skip
    for (count, context), splits in cases.items():
        lengths = [(1, context)] * count
        rows: list[Row] = []
        chosen = decode_plan(shape(4), count, context, multiprocessors(torch.device("cuda", 0)))
        for (tile, warps, stages), n in product(forms, splits):
            plan = DecodePlan(tile, warps, stages, count * (n - 1), tile)
            rows += _measured(plan, partial(_decode_time, arena, lengths, plan=plan, target_ms=8.0))
        rows.sort(key=lambda row: float(row["us"]))
        rows = rows[:10]
        rows += [
            {**row, "chosen": True}
            for row in _measured(chosen, partial(_decode_time, arena, lengths))
        ]
        for row in rows:
            rate = kv_bytes(lengths) / float(row["us"]) * 1e6
            yield {"batch": count, "context": context, **row, "of copy": rate / ceiling}


def _measured(plan: DecodePlan | VarlenPlan, time: Callable[[], float]) -> list[Row]:
    try:
        return [{"plan": repr(plan), "us": time() * 1e6}]
    except Exception as error:
        print(f"  {plan}: {type(error).__name__}", flush=True)
        return []


def sweep_prefill(arena: Arena) -> Iterable[Row]:
    """Rows, tiles, warps, stages of the variable-length kernel, and splits of prefix hits."""
    forms = [
        (rows, tile, warps, stages)
        for rows, tile, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
        if not (rows == 64 and warps == 8) and tile * stages <= 384
    ]
    small = [(r, t, w, 3) for r, t, w in product((16, 32, 64), (32, 64), (2, 4))]
    tiny = step([(64, 64)])
    kv = arena.pool(blocks_of(tiny), most_layers=1)
    q = _queries(tiny, 4)
    plans = [VarlenPlan(*form, 1, 256) for form in forms]
    plans += [VarlenPlan(*form, n, 64) for form in small for n in (1, 2)]
    compile_all([partial(varlen_attention, q, kv, 0, tiny, shape(4), p) for p in plans])
    cases: dict[str, list[VarlenPlan]] = {
        name: [VarlenPlan(*form, 1, 256) for form in forms] for name in PREFILLS
    }
    cases |= {
        name: [VarlenPlan(*form, n, 64) for form, n in product(small, (8, 16, 32))]
        for name in MIXED
        if name.startswith("prefix")
    }
    every = PREFILLS | MIXED
    for name, candidates in cases.items():
        lengths = every[name]
        rows = [
            row
            for plan in candidates
            for row in _measured(plan, partial(_prefill_time, arena, lengths, plan, layers=2))
        ]
        rows.sort(key=lambda row: float(row["us"]))
        chosen = varlen_plan(
            shape(4), sum(q for q, _ in lengths), len(lengths), lengths[0][1],
            multiprocessors(torch.device("cuda", 0)),
        )  # fmt: skip
        for row in rows[:10] + [
            {**row, "chosen": True}
            for row in _measured(chosen, partial(_prefill_time, arena, lengths, layers=2))
        ]:
            yield {"step": name, **row, "TFLOP/s": _flops(lengths) / float(row["us"]) / 1e6}
