"""Log-probabilities of the drawn token and of the most likely ones, without a copy of the row.

The first pass over a row left the largest logit of each chunk. The most likely token is the largest
of these; the next one is, once the chunk it came from has been looked through for its next largest.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedd_kernels.gpu.candidates import packed, unpacked
from pagedd_kernels.plans import power_of_two


@triton.jit(
    do_not_specialize=["vocab", "chunks", "top"],
    do_not_specialize_on_alignment=[
        "peaks", "places", "row_peaks", "row_masses", "tokens", "sound", "logprobs", "top_tokens",
        "top_logprobs",
    ],
)  # fmt: skip
def _likelihoods(
    logits, peaks, places, row_peaks, row_masses, tokens, sound, logprobs, top_tokens, top_logprobs,
    vocab, chunks, top, stride, PAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * stride
    peak = tl.load(row_peaks + row)
    token = tl.load(tokens + row)
    # The peak of a row that is no numbers is NaN.
    token = tl.where(peak == peak, token, -1)
    tl.store(sound + row, token)
    norm = peak.to(tl.float64) + tl.log(tl.load(row_masses + row))
    chosen = tl.load(line + tl.maximum(token, 0)).to(tl.float64)
    tl.store(logprobs + row, (chosen - norm).to(tl.float32))
    chunk = tl.arange(0, PAD)
    there = chunk < chunks
    value = tl.load(peaks + row * chunks + chunk, mask=there, other=float("-inf"))
    place = tl.load(places + row * chunks + chunk, mask=there, other=0x7FFFFFFF)
    # Value and id in one number, so that of equal logits the lowest ids are taken, in order.
    keys = packed(value, place)
    for at in range(top):
        best = tl.max(keys, 0)
        logit, where = unpacked(best)
        where = tl.minimum(where, vocab - 1)
        tl.store(top_tokens + row * top + at, where)
        tl.store(top_logprobs + row * top + at, (logit.to(tl.float64) - norm).to(tl.float32))
        ids = where // CHUNK * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(line + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        left = packed(x, tl.where(ids < vocab, ids, 0x7FFFFFFF))
        left = tl.max(tl.where(left < best, left, -0x7FFFFFFFFFFFFFFF), 0)
        keys = tl.where(chunk == where // CHUNK, left, keys)


def likelihoods(
    logits: Tensor, known: Any, tokens: Tensor, top: int, chunk: int
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `pagedd_kernels.Sampled` consists of.

    Args:
        logits: [N, vocab], the model's own.
        known: What the first pass over them found of each row.
        tokens: int32 [N], drawn.
        top: How many of the most likely tokens are reported.
        chunk: Logits per program of the first pass.

    Returns:
        Tokens, -1 in rows that are no numbers; log-probabilities; with ``top`` also the most likely
        tokens and theirs.
    """
    rows, vocab = logits.shape
    sound = torch.empty_like(tokens)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    top_tokens = torch.empty(rows, top, dtype=torch.int32, device=logits.device)
    top_logprobs = torch.empty(rows, top, dtype=torch.float32, device=logits.device)
    _likelihoods[(rows,)](
        logits, known.chunk_peaks, known.places, known.peaks, known.masses, tokens, sound, logprobs,
        top_tokens, top_logprobs, vocab, known.chunks, top, logits.stride(0),
        PAD=power_of_two(known.chunks), CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    if not top:
        return sound, logprobs
    return sound, logprobs, top_tokens, top_logprobs
