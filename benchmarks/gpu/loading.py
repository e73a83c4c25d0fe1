"""Loading an 8B model onto a GPU: safetensors (16 GB) and GGUF Q4_K (4.5 GB), both page-cached.

Makes both models out of random numbers in a temporary folder (21 GB). Some rows of every kind of
weight are compared with the same bytes decoded on the CPU before a figure is believed. Beside the
figures stand the floors: reading the files out of the page cache with as many threads, and copying
as many bytes from page-locked memory to the device.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.made_models import llama_8b, write_folder, write_gguf
from benchmarks.report import Report, Row
from pagedd_daemon.models import weights
from pagedd_daemon.models.decoder import Decoder
from pagedd_daemon.models.dequant import decode
from pagedd_daemon.models.model import read_model
from pagedd_daemon.models.stored import StoredModel, StoredTensor
from pagedd_daemon.models.tensor_names import Piece

REPEATS = 3
QUICK_LAYERS = 4


def loading(report: Report) -> None:
    """The stage."""
    device = torch.device("cuda", 0)
    config = llama_8b(layers=QUICK_LAYERS if report.quick else 32)
    copies = _copy_bytes_per_s(device)
    report.add(Row("copy from page-locked memory to the device", copies / 1e9, "GB/s"))
    with tempfile.TemporaryDirectory(prefix="pagedd-loading-") as scratch:
        folder, file = Path(scratch, "model"), Path(scratch, "model.gguf")
        write_folder(config, folder)
        _measure(report, "safetensors, bf16", folder, "<= 4", copies)
        write_gguf(config, file)
        _measure(report, "GGUF, Q4_K", file, "<= 10", copies)


def _measure(report: Report, name: str, path: Path, must: str, copies: float) -> None:
    """Load a model several times; the rows of the first, and of the best beside its floors."""
    device = torch.device("cuda", 0)
    stored = read_model(path)
    size = sum(tensor.size for tensor in stored.tensors.values())
    seconds = []
    for attempt in range(REPEATS):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        decoder = Decoder.load(path, device, torch.bfloat16, context_tokens=8192)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if attempt == 0:
            check(decoder, stored)
        held = decoder.weight_bytes
        above = torch.cuda.max_memory_allocated() - held
        del decoder
    reading = _timed(lambda: _read_all(stored))
    floors = f"page cache alone {reading:.2f} s, copies alone {size / copies:.2f} s"
    report.add(Row(f"{name}: first load", seconds[0], "s", must, f"{size / 1e9:.1f} GB"))
    report.add(Row(f"{name}: best of {REPEATS}", min(seconds), "s", "", floors))
    report.add(Row(f"{name}: device memory beyond the weights", above / 1e9, "GB", "<= 2"))


def check(decoder: Decoder, stored: StoredModel) -> None:
    """The first and last rows of every weight of the first and last layer, decoded on the CPU."""
    layers = {None, 0, decoder.config.layers - 1}
    for parameter, tensors in stored.plan():
        if parameter.layer not in layers:
            continue
        owner = decoder if parameter.layer is None else decoder.layers[parameter.layer]
        loaded: Tensor = getattr(owner, parameter.key)
        for piece, tensor in zip(parameter.pieces, tensors, strict=True):
            for first, wanted in _some_rows(piece, tensor):
                at = piece.row + first
                got = loaded[at : at + len(wanted)].cpu()
                # Both are float32 rounded to bf16, formed in the same order.
                torch.testing.assert_close(got.float(), wanted.to(got.dtype).float().view_as(got))


def _some_rows(piece: Piece, tensor: StoredTensor) -> Iterator[tuple[int, Tensor]]:
    rows, columns = (*piece.shape, 1)[:2]
    count = min(piece.interleaved or 16, rows)
    row_bytes = tensor.size // rows
    for first in (0, rows - count):
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset + first * row_bytes)
            raw = torch.frombuffer(bytearray(file.read(count * row_bytes)), dtype=torch.uint8)
        values = decode(raw, tensor.kind, count, columns)
        if piece.interleaved:  # one head: rows 0, 2, 4, … are its first half
            values = torch.cat([values[0::2], values[1::2]])
        yield first, values


def _copy_bytes_per_s(device: torch.device, size: int = 1 << 30) -> float:
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device=device)

    def copy() -> None:
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()

    copy()
    return size / _timed(copy)


def _read_all(stored: StoredModel) -> None:
    files = {t.path: os.open(t.path, os.O_RDONLY) for t in stored.tensors.values()}
    step = weights.CHUNK_BYTES
    jobs = [
        (files[t.path], at, min(step, t.offset + t.size - at))
        for t in stored.tensors.values()
        for at in range(t.offset, t.offset + t.size, step)
    ]
    buffers = [bytearray(step) for _ in range(weights.THREADS)]

    def read(worker: int) -> None:
        view = memoryview(buffers[worker])
        for file, at, size in jobs[worker :: weights.THREADS]:
            os.preadv(file, [view[:size]], at)

    with ThreadPoolExecutor(weights.THREADS) as pool:
        list(pool.map(read, range(weights.THREADS)))
    for file in files.values():
        os.close(file)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
