"""From a model's files to a `PagedBackend` that serves: memory, weights, warm-up, pool.

The order is what makes the memory come out right: what a step takes beside weights and pool is
only known once every shape has been computed, so the pool is grown last, to what is left.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from pagedd_daemon.backends.base import Capabilities, ModelLoadError
from pagedd_daemon.backends.paged.arena import (
    Arena,
    ArenaMemoryError,
    PoolShape,
    make_arena,
)
from pagedd_daemon.backends.paged.backend import LEAST_PIECE_TOKENS, PagedBackend
from pagedd_daemon.backends.paged.caches import CompileCounter, use_cache_folder
from pagedd_daemon.backends.paged.device_memory import free_bytes, ran_out
from pagedd_daemon.backends.paged.graphs import CudaCapturer
from pagedd_daemon.backends.paged.layout import (
    MIXED_BUCKETS,
    MOST_SEQUENCES,
    Buckets,
    StepShape,
    decode_buckets,
)
from pagedd_daemon.backends.paged.runner import Limits, Model, Runner
from pagedd_daemon.backends.paged.slabs import RamTier
from pagedd_daemon.backends.paged.startup import LoadReport
from pagedd_daemon.backends.paged.warmup import warm_up
from pagedd_daemon.engine.tiers.opening import DiskWishes, open_disk
from pagedd_daemon.engine.tiers.ram import RamStore
from pagedd_daemon.engine.tiers.ranges import round_up
from pagedd_daemon.engine.tiers.records import bind
from pagedd_daemon.messages import Configure
from pagedd_daemon.models.config import fits
from pagedd_daemon.models.decoder import Decoder
from pagedd_daemon.models.errors import ModelError
from pagedd_daemon.models.model import read_model

log = logging.getLogger(__name__)

_Made = TypeVar("_Made")

BLOCK_TOKENS = 16
CUDA_STEP_TOKENS = 8192
"""A prompt of 6,000 tokens is one step; matrix products are at full speed from 2,000 on."""
CPU_STEP_TOKENS = 512
_CPU_CONTEXTS = 4
"""Sequences of full length that the pool on a CPU has room for, unless memory is short."""
_CPU_SHARE = 0.25
"""Of the memory that is available, what a pool on a CPU may take by itself."""
_CUDA_SHARE = 0.9
"""Of the device memory that is left after warm-up, what the pool takes by itself: the desktop needs
some."""
_PLAIN_SHARE = 0.75
"""The same where the pool cannot grow and is made before warm-up."""
_RESERVE_BYTES = 1 << 30
"""Device memory for everything but weights and KV, at the least."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the engine is told beside the model."""

    kv_tokens: int = 0
    """Tokens of the pool; 0: by the memory there is."""
    ram_bytes: int = 0
    ram_fd: int = -1
    """The memory file of the RAM tier; -1: one of its own."""
    vram_bytes: int = 0
    """CUDA only: device memory for weights, steps and pool; 0: what there is."""
    disk: DiskWishes = field(default_factory=DiskWishes)
    context_tokens: int = 0
    """0: the model's."""
    model_digest: bytes = bytes(32)
    eog_tokens: frozenset[int] = frozenset()
    asynchronous: bool | None = None
    """Whether a second step may be launched before the first is collected; None: on CUDA."""
    step_tokens: int = 0
    """Tokens of a step; 0: by the device."""


def load(configure: Configure, progress: Callable[[float], None]) -> PagedBackend:
    """Load what ``configure`` names, on the CUDA device or else on the CPU.

    Args:
        configure: The model and how much memory.
        progress: Called with the fraction that is done.

    Raises:
        ModelLoadError: The model cannot be served, and why.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    if cuda:
        use_cache_folder()
    else:
        torch.set_num_threads(configure.threads or _physical_cores())
    report = LoadReport()
    path = Path(configure.model_path)
    wishes = Wishes(
        kv_tokens=configure.kv_tokens,
        ram_bytes=configure.ram_bytes,
        ram_fd=configure.ram_fd,
        vram_bytes=configure.vram_bytes,
        disk=DiskWishes.of(configure),
        context_tokens=configure.context_tokens,
        model_digest=configure.model_digest,
        eog_tokens=frozenset(configure.eog_tokens),
    )
    try:
        config = read_model(path).config
        if configure.vocab_size > config.vocab_size:
            raise ModelLoadError(
                f"{path}: the tokeniser knows {configure.vocab_size} tokens, the model "
                f"{config.vocab_size}",
                {"tokenizer": configure.vocab_size, "model": config.vocab_size},
            )
        context = configure.context_tokens or config.context_tokens
        free = free_bytes(device)
        if cuda and configure.vram_bytes:
            free = min(free, configure.vram_bytes)
        fits(
            config,
            dtype_bytes=dtype.itemsize,
            free_bytes=free,
            tokens=configure.kv_tokens or 2 * BLOCK_TOKENS,
            reserve_bytes=_RESERVE_BYTES if cuda else 0,
        )
        with report.part("weights") as part:
            model = Decoder.load(
                path, device, dtype, lambda done, whole: progress(0.8 * done / whole), context
            )
            part.count = len(model.layers)
    except ModelError as error:
        raise ModelLoadError(error.message, dict(error.details)) from error
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise ModelLoadError(f"{path}: the device is out of memory: {error}") from error
    return serve(model, wishes, report)


@torch.no_grad()
def serve(model: Model, wishes: Wishes, report: LoadReport | None = None) -> PagedBackend:
    """A backend over a model that is there, warmed up.

    Args:
        model: What computes.
        wishes: What it is to have.
        report: What loading has taken so far.

    Raises:
        ModelLoadError: There is no memory for a pool.
    """
    report = report or LoadReport()
    device = model.device
    cuda = device.type == "cuda"
    config = model.config
    shape = PoolShape(config.layers, BLOCK_TOKENS, config.kv_heads, config.head_dim, model.dtype)
    counter = None
    if cuda:
        # The default stream waits for all others, and cannot be captured.
        torch.cuda.set_stream(torch.cuda.Stream(device))
        counter = CompileCounter()
    most, first = _pool_blocks(wishes, shape, model)
    try:
        arena: Arena = make_arena(shape, most, first, device)
    except ArenaMemoryError as error:
        raise ModelLoadError(str(error), {"block_bytes": shape.block_bytes}) from error
    step_tokens = wishes.step_tokens or (CUDA_STEP_TOKENS if cuda else CPU_STEP_TOKENS)
    limits = Limits(
        sequences=MOST_SEQUENCES,
        step_tokens=step_tokens,
        context_tokens=model.context_tokens,
        block_tokens=BLOCK_TOKENS,
        vocab_size=config.vocab_size,
    )
    runner = Runner(model, arena.kv, limits, CudaCapturer() if cuda else None)
    buckets = None
    if counter is not None:
        buckets = _get_ready(runner, arena.kv, report, counter)
        counter.reset()
        with report.part("pool") as part:
            part.count = arena.resize(_cuda_blocks(device, shape, arena, wishes))
    caps = _capabilities(model, wishes, shape, arena.blocks, runner.limits.step_tokens)
    page_values = shape.block_bytes // shape.dtype.itemsize
    binding = bind(caps.name, caps.model_digest, caps.kv_dtype, *shape.tensor_shape(1))
    store = RamStore(wishes.ram_fd, wishes.ram_bytes, binding, caps.ram_blocks)
    ram = RamTier(store, caps.ram_blocks, page_values, shape.dtype, lock=cuda)
    disk = open_disk(wishes.disk, binding, round_up(shape.block_bytes), pieces=False)
    caps = replace(caps, disk_blocks=disk.slots, disk_persists=disk.persists)
    return PagedBackend(model, arena, ram, disk, caps, runner, buckets, counter, report)


def _buckets(step_tokens: int) -> Buckets:
    """What is captured where steps have at most so many tokens."""
    mixed = tuple(size for size in MIXED_BUCKETS if size <= step_tokens)
    return Buckets(decode_buckets(MOST_SEQUENCES), mixed, MOST_SEQUENCES)


def _capabilities(
    model: Model, wishes: Wishes, shape: PoolShape, there: int, step_tokens: int
) -> Capabilities:
    """What the engine is told, with a pool of ``there`` blocks or as many as were asked for.

    Raises:
        ModelLoadError: More blocks were asked for, or there are hardly any.
    """
    asked = wishes.kv_tokens // BLOCK_TOKENS
    blocks = min(there, asked) if asked else there
    if blocks < max(2, asked):
        _refuse_pool(wishes, shape, blocks)
    cuda = model.device.type == "cuda"
    return Capabilities(
        name="torch",
        device=_device_name(model.device),
        model_digest=wishes.model_digest,
        kv_dtype=_KV_NAMES[model.dtype],
        vocab_size=model.config.vocab_size,
        context_tokens=min(model.context_tokens, (blocks - 1) * BLOCK_TOKENS),
        eog_tokens=wishes.eog_tokens | model.config.eog_tokens,
        gpu_blocks=blocks,
        ram_blocks=wishes.ram_bytes // shape.block_bytes,
        block_tokens=BLOCK_TOKENS,
        block_bytes=shape.block_bytes,
        max_sequences=MOST_SEQUENCES,
        max_step_tokens=step_tokens,
        asynchronous=cuda if wishes.asynchronous is None else wishes.asynchronous,
        keep_cached_on_gpu=True,
        constrains=True,
        notice="" if cuda else "The torch backend computes on the CPU: it found no CUDA device.",
    )


_KV_NAMES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16"}


def _get_ready(
    runner: Runner, kv: torch.Tensor, report: LoadReport, compiled: CompileCounter
) -> Buckets:
    """Compute the largest step once, then warm up, with smaller steps where memory does not suffice
    for either; `Runner.limits` says then which. Returns the shapes that were captured."""

    def once(tokens: int) -> int:
        sequences = min(tokens, runner.limits.sequences)
        runner.rehearse(StepShape(tokens, sequences, sequences, False))
        return tokens

    def warm(tokens: int) -> Buckets:
        runner.forget()
        runner.limits = replace(runner.limits, step_tokens=tokens)
        buckets = _buckets(tokens)
        warm_up(runner, kv, buckets, report, compiled)
        return buckets

    return largest_that_fits(warm, largest_that_fits(once, runner.limits.step_tokens))


def largest_that_fits(prepare: Callable[[int], _Made], tokens: int) -> _Made:
    """What ``prepare`` makes for steps of ``tokens``, or of half as many while the device has no
    memory for that.

    Raises:
        ModelLoadError: It has none for the smallest steps.
    """
    while True:
        try:
            return prepare(tokens)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            if tokens <= LEAST_PIECE_TOKENS:
                why = f"the device has no memory for a step of {tokens} tokens: {error}"
                raise ModelLoadError(why, {"tokens": tokens}) from error
        tokens //= 2
        log.warning("no memory to get ready: steps of %d tokens at most", tokens)
        torch.cuda.empty_cache()


def _pool_blocks(wishes: Wishes, shape: PoolShape, model: Model) -> tuple[int, int]:
    """Blocks a pool may ever have, and those of one that cannot grow."""
    device = model.device
    free = free_bytes(device)
    if device.type == "cuda":
        most = torch.cuda.get_device_properties(device).total_memory // shape.block_bytes
        plain = int(free * _PLAIN_SHARE) // shape.block_bytes
    else:
        contexts = _CPU_CONTEXTS * model.context_tokens // BLOCK_TOKENS
        most = plain = min(contexts, int(free * _CPU_SHARE) // shape.block_bytes)
    if wishes.kv_tokens:
        plain = wishes.kv_tokens // BLOCK_TOKENS
        if plain * shape.block_bytes > free:
            _refuse_pool(wishes, shape, free // shape.block_bytes)
        most = max(most, plain)
    return most, plain


def _cuda_blocks(device: torch.device, shape: PoolShape, arena: Arena, wishes: Wishes) -> int:
    """Blocks of the whole pool: as asked for, or its share of what is free; no more than it may."""
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(device) + arena.bytes
    return arena.blocks + pool_growth(wishes, shape, arena.blocks, free_bytes(device), held)


def pool_growth(wishes: Wishes, shape: PoolShape, blocks: int, free: int, held: int) -> int:
    """Blocks that a pool of ``blocks`` gets when weights and steps have what they need.

    Args:
        wishes: What was asked for.
        shape: Of a block.
        blocks: What it has.
        free: Bytes of the device that nobody has.
        held: Bytes that weights, steps and pool have.
    """
    asked = wishes.kv_tokens // BLOCK_TOKENS
    more = asked - blocks if asked else int(free * _CUDA_SHARE) // shape.block_bytes
    if wishes.vram_bytes:
        more = min(more, (wishes.vram_bytes - held) // shape.block_bytes)
    return max(0, more)


def _refuse_pool(wishes: Wishes, shape: PoolShape, blocks: int) -> None:
    needed = max(2 * BLOCK_TOKENS, wishes.kv_tokens)
    there = blocks * BLOCK_TOKENS
    raise ModelLoadError(
        f"a pool of {needed} tokens takes {needed // BLOCK_TOKENS * shape.block_bytes} bytes; "
        f"there is room for {there} tokens",
        {"kv_tokens": needed, "room_tokens": there, "block_bytes": shape.block_bytes},
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' if threads > 1 else ''})"


def _physical_cores() -> int:
    import psutil

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return max(1, min(cores, len(os.sched_getaffinity(0))))
