"""Times loading an 8B model onto a GPU: safetensors (16 GB) and GGUF Q4_K (4.6 GB), page-cached.

    PYTHONPATH=daemon:kernels python -m benchmarks.gpu.loading --out DIR [--folder SCRATCH]

Makes both models out of random numbers in a scratch folder (21 GB), and removes them again. Checks
some rows of every kind of weight against the same bytes decoded on the CPU before it believes a
figure. Beside the figures stand the floors: reading the files out of the page cache with as many
threads, and copying as many bytes from pinned memory to the device.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.made_models import llama_8b, write_folder, write_gguf
from pagedd_daemon.models import weights
from pagedd_daemon.models.decoder import Decoder
from pagedd_daemon.models.dequant import decode
from pagedd_daemon.models.model import read_model
from pagedd_daemon.models.stored import StoredModel, StoredTensor
from pagedd_daemon.models.tensor_names import Piece

Row = dict[str, Any]
MUST_S = {"safetensors": 4.0, "gguf": 10.0}
"""Seconds a load may take: what is left of the whole start for it."""
REPEATS = 3


def measure(name: str, path: Path, device: torch.device) -> Row:
    """Load a model several times: the first with cold allocators, the best, and what it took."""
    stored = read_model(path)
    file_bytes = sum(tensor.size for tensor in stored.tensors.values())
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
        weight_bytes = decoder.weight_bytes
        peak = torch.cuda.max_memory_allocated()
        del decoder
    reading = _timed(lambda: _read_all(stored))
    return {
        "what": name,
        "first_s": round(seconds[0], 2),
        "best_s": round(min(seconds), 2),
        "file_gb": round(file_bytes / 1e9, 2),
        "gb_per_s": round(file_bytes / 1e9 / min(seconds), 2),
        "page_cache_floor_s": round(reading, 2),
        "weights_gb": round(weight_bytes / 1e9, 2),
        "peak_over_weights_gb": round((peak - weight_bytes) / 1e9, 2),
        "must_s": MUST_S[name],
        "ok": seconds[0] <= MUST_S[name],
    }


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


def copy_floor(device: torch.device, size: int = 1 << 30) -> Row:
    """Bytes per second from pinned memory to the device."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device=device)

    def copy() -> None:
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()

    copy()
    return {"what": "pinned copy to the device", "gb_per_s": round(size / 1e9 / _timed(copy), 1)}


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


def main() -> int:
    """Make, check, measure; exit status 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description="Times loading an 8B model onto a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="where loading.json goes")
    parser.add_argument("--folder", type=Path, help="scratch folder; made and removed by default")
    parser.add_argument("--layers", type=int, default=32, help="fewer for a trial run")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    config = llama_8b(layers=arguments.layers)
    rows = [copy_floor(device)]
    print(rows[-1])
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="loading-") as scratch:
        folder, file = Path(scratch, "model"), Path(scratch, "model.gguf")
        spent = _timed(lambda: (write_folder(config, folder), write_gguf(config, file)))
        print(f"made both models in {spent:.0f} s", flush=True)
        for name, path in (("safetensors", folder), ("gguf", file)):
            rows.append(measure(name, path, device))
            print(rows[-1], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {"device": torch.cuda.get_device_name(device), "rows": rows}
    (arguments.out / "loading.json").write_text(json.dumps(report, indent=1))
    return 0 if all(row.get("ok", True) for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
