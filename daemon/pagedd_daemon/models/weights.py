"""Weights from files to the device: read by several threads, decoded where they will be used.

Bytes go from the page cache into pinned buffers and from there to the device by its copy engine,
while other threads read on; they are decoded on the device, straight into their place in the
merged matrix. So the device never holds much more than the weights, and a quantised file costs no
time of the CPU. Reading beats mapping here: a mapping takes a page fault for every 4 KiB, and pages
of a mapping cannot be pinned as they come.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pagedd_daemon.models.config import ModelConfig
from pagedd_daemon.models.dequant import decode
from pagedd_daemon.models.errors import ModelFileError
from pagedd_daemon.models.files import open_regular
from pagedd_daemon.models.stored import BLOCKS, StoredModel, StoredTensor
from pagedd_daemon.models.tensor_names import HUGGING_FACE_GEMMA, Parameter, parameters

Weights = dict[tuple[int | None, str], Tensor]
"""By layer (None for none) and `Parameter.key`."""

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and those of all weights, once for each percent, from the
thread that loads."""

CHUNK_BYTES = 16 * 2**20
"""Bytes of a file that are read, sent and decoded at a time: one buffer."""
CHUNK_ELEMENTS = 2 * 2**20
"""Weights of a quantised chunk at most: decoding takes several float32 copies of them, 16 lanes at
the same time, on a device that may have little room beside the weights."""
THREADS = 8
"""Readers, on a machine that has as many cores. One copies 6 to 10 GB/s out of the page cache."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Whole rows of a stored tensor, and where they go."""

    tensor: StoredTensor
    offset: int
    size: int
    rows: int
    columns: int
    target: Tensor
    """The rows of the weight, ``[rows, columns]``."""
    interleaved: int
    plus_one: bool


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the factors of norms: files keep them in float32, and they cost nothing."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def load_weights(
    stored: StoredModel,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> Weights:
    """Read all weights of a model.

    Args:
        stored: The model; what is wrong with its tensors is said before memory is taken.
        device: Where to.
        dtype: Of the matrices.
        progress: Told how far it is.

    Raises:
        ModelFileError: A tensor is missing, wrong or cut short; names file and tensor.
        torch.OutOfMemoryError: The device has too little memory.
    """
    plan = stored.plan()
    weights: Weights = {}
    chunks: list[_Chunk] = []
    for parameter, tensors in plan:
        place = _empty(parameter, device, dtype)
        weights[parameter.layer, parameter.key] = place
        for piece, tensor in zip(parameter.pieces, tensors, strict=True):
            target = place[piece.row : piece.row + piece.shape[0]]
            chunks += _chunks(tensor, target, piece.interleaved, parameter.plus_one)
    _Loader(device).run(chunks, progress)
    return weights


def random_weights(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int
) -> Weights:
    """Weights that keep activations in their usual range, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    weights: Weights = {}
    for parameter in parameters(config, HUGGING_FACE_GEMMA):
        place = _empty(parameter, device, dtype)
        if parameter.is_norm:
            place.fill_(1.0)
        elif parameter.key == "embedding":
            place.normal_(0.0, 1.0, generator=generator)
        else:
            place.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        weights[parameter.layer, parameter.key] = place
    return weights


def _empty(parameter: Parameter, device: torch.device, dtype: torch.dtype) -> Tensor:
    kind = norm_dtype(dtype) if parameter.is_norm else dtype
    return torch.empty(parameter.shape, dtype=kind, device=device)


def _chunks(
    tensor: StoredTensor, target: Tensor, interleaved: int, plus_one: bool
) -> Iterator[_Chunk]:
    """A tensor in pieces that fit a buffer, cut between rows, and between heads where rows move."""
    rows, columns = (*tensor.shape, 1)[:2]
    target = target.view(rows, columns)
    elements, size = BLOCKS[tensor.kind]
    row_bytes = columns // elements * size
    unit = interleaved or 1
    most = CHUNK_BYTES // row_bytes
    if elements > 1:
        most = min(most, CHUNK_ELEMENTS // columns)
    most = max(most // unit * unit, unit)
    for first in range(0, rows, most):
        count = min(most, rows - first)
        yield _Chunk(
            tensor,
            tensor.offset + first * row_bytes,
            count * row_bytes,
            count,
            columns,
            target[first : first + count],
            interleaved,
            plus_one,
        )


class _Loader:
    """Readers and their buffers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._lanes: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        self._files: dict[Path, int] = {}

    def run(self, chunks: list[_Chunk], progress: Progress | None) -> None:
        """Load every chunk."""
        total = sum(chunk.size for chunk in chunks)
        threads = max(1, min(THREADS, len(os.sched_getaffinity(0)), len(chunks)))
        buffer = max((chunk.size for chunk in chunks), default=0)
        with ExitStack() as stack:
            for path in {chunk.tensor.path for chunk in chunks}:
                self._files[path] = open_regular(path)
                stack.callback(os.close, self._files[path])
            # Two buffers per reader: one is being filled while the device still reads the other.
            for _ in range(2 * threads if self._cuda else threads):
                self._lanes.put(_Lane(buffer, self._device))
            readers = stack.enter_context(ThreadPoolExecutor(threads, "weights"))
            done = 0
            waiting = [readers.submit(self._load, chunk) for chunk in chunks]
            try:
                for future in as_completed(waiting):
                    before, done = done, done + future.result()
                    if progress is not None and before * 100 // total != done * 100 // total:
                        progress(done, total)
            except BaseException:
                readers.shutdown(cancel_futures=True)
                raise
        if self._cuda:
            torch.cuda.synchronize(self._device)
            self._lanes = queue.SimpleQueue()
            torch.cuda.empty_cache()  # what decoding took

    def _load(self, chunk: _Chunk) -> int:
        lane = self._lanes.get()
        try:
            lane.load(chunk, self._files[chunk.tensor.path])
        finally:
            self._lanes.put(lane)
        return chunk.size


class _Lane:
    """A buffer, and the stream that empties it."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        # Multiples of 8 bytes, so that every plain type can be viewed.
        self._buffer = torch.empty(-(-size // 8) * 8, dtype=torch.uint8, pin_memory=self._cuda)
        self._bytes = self._buffer.numpy().data
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        if self._stream is not None:
            # The places were allocated in the order of the current stream.
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def load(self, chunk: _Chunk, file: int) -> None:
        """Read a chunk and put it into its place; on CUDA, the latter ends later."""
        if self._stream is not None:
            self._stream.synchronize()  # the buffer's last bytes are gone
        self._read(chunk, file)
        with torch.inference_mode(), self._on_stream():
            raw = self._buffer[: chunk.size]
            if self._cuda:
                raw = raw.to(self._device, non_blocking=True)
            values = decode(raw, chunk.tensor.kind, chunk.rows, chunk.columns)
            if chunk.interleaved:
                values = _halves(values, chunk.interleaved)
            if chunk.plus_one:
                values = values.to(chunk.target.dtype) + 1
            chunk.target.copy_(values)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _read(self, chunk: _Chunk, file: int) -> None:
        done = 0
        while done < chunk.size:
            got = os.preadv(file, [self._bytes[done : chunk.size]], chunk.offset + done)
            if not got:
                raise ModelFileError(
                    chunk.tensor.path,
                    f"ends within tensor {chunk.tensor.name!r}: it was changed while it was read",
                    {"tensor": chunk.tensor.name},
                )
            done += got


def _halves(rows: Tensor, head_rows: int) -> Tensor:
    """Rows of heads from interleaved halves (pairs of neighbours are rotated) to one after the
    other (element i and i + head_rows / 2 are)."""
    columns = rows.shape[-1]
    paired = rows.view(-1, head_rows // 2, 2, columns)
    return paired.transpose(1, 2).reshape(-1, columns)
