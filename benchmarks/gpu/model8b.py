"""The model that GPU figures are taken with: Llama-3.1-8B's shape, random weights in bf16."""

from __future__ import annotations

import time

import torch

from benchmarks.gpu.made_models import llama_8b
from benchmarks.report import Report, Row
from pagedd_daemon.backends.paged.backend import PagedBackend
from pagedd_daemon.backends.paged.load import Wishes, serve
from pagedd_daemon.engine.tiers.opening import DiskWishes
from pagedd_daemon.models.decoder import Decoder

CONTEXT = 8192
COPY_BYTES_PER_S = 4.29e12
"""Measured on the H200 that the other engines' figures are from; floors are over it."""
KV_BYTES_PER_TOKEN = 131_072
WEIGHT_BYTES = 15.0e9
"""Read in a decode step: all but the embedding, of which a row per token."""


def backend_8b(
    *,
    kv_gb: float = 40.0,
    ram_gb: float = 0.0,
    context: int = CONTEXT,
    eog_tokens: frozenset[int] = frozenset(),
    disk: DiskWishes | None = None,
) -> tuple[PagedBackend, dict[str, float]]:
    """A backend that is warmed up, and the seconds its parts took."""
    device = torch.device("cuda", 0)
    begin = time.monotonic()
    model = Decoder.random(llama_8b(context), device, torch.bfloat16, 0, context)
    torch.cuda.synchronize()
    made = time.monotonic()
    wishes = Wishes(
        kv_tokens=int(kv_gb * 1e9) // KV_BYTES_PER_TOKEN // 16 * 16,
        ram_bytes=int(ram_gb * 1e9),
        eog_tokens=eog_tokens,
        disk=disk or DiskWishes(),
    )
    backend = serve(model, wishes)
    torch.cuda.synchronize()
    seconds = {"weights": made - begin, "warm_up": time.monotonic() - made}
    parts = {f"warm_up, {p.name} ({p.count})": p.seconds for p in backend.load_report.parts}
    return backend, seconds | parts


def late_compiles(report: Report, backend: PagedBackend) -> None:
    """The row that every stage ends with."""
    note = ", ".join(backend.compiled_late())
    count = backend.counters()["late_compiles"]
    report.add(Row("kernels compiled after warm-up", count, "", "== 0", note))
    torch.cuda.empty_cache()


def decode_floor_ms(batch: int, context: int) -> float:
    """Weights and KV once over the copy bandwidth (batch 256: the matrix work counted, 9.4)."""
    return 1e3 * (WEIGHT_BYTES + batch * context * KV_BYTES_PER_TOKEN) / COPY_BYTES_PER_S
