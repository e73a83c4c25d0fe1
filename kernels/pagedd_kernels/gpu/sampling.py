"""Sampling on the device: what is added to logits, then the draw, then log-probabilities."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedd_kernels.gpu import candidates
from pagedd_kernels.gpu.likelihoods import likelihoods
from pagedd_kernels.gpu.masking import allow
from pagedd_kernels.gpu.searching import search
from pagedd_kernels.params import Penalties, Sampled, SampleParams
from pagedd_kernels.plans import power_of_two
from pagedd_kernels.references.sampling import LARGEST, count
from pagedd_kernels.references.sampling import sample as sample_by_sorting

CHUNK = 512
"""Logits per program of the first pass: their maxima bound the k-th largest logit for k up to
vocabulary / 512, which is 250 for Llama 3."""
CAPACITY = 1024
"""Tokens that are sorted to decide a draw."""
BLOCK = 1024
"""Logits per iteration where a whole row is summed."""
_LARGEST = tl.constexpr(LARGEST)


@triton.jit(
    do_not_specialize=["vocab"],
    do_not_specialize_on_alignment=["rows", "repetition", "presence", "frequency"],
)
def _penalise(
    logits, rows, counts, repetition, presence, frequency, vocab, stride, CHUNK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    table = tl.load(rows + row)
    if table >= 0:
        ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        there = ids < vocab
        seen = tl.load(counts + table.to(tl.int64) * vocab + ids, mask=there, other=0)
        at = logits + row.to(tl.int64) * stride + ids
        there = there & (seen > 0)
        x = tl.load(at, mask=there, other=0.0).to(tl.float64)
        factor = tl.load(repetition + row).to(tl.float64)
        x = tl.where(x > 0, x / factor, x * factor)
        times = seen >> 1
        x = x - times.to(tl.float64) * tl.load(frequency + row).to(tl.float64)
        x = x - tl.where(times > 0, tl.load(presence + row).to(tl.float64), 0.0)
        x = tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)
        tl.store(at, x.to(tl.float32), mask=there)


@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=["ids", "values"])
def _at_ids(logits, ids, values, width, stride, PAD: tl.constexpr, MASK: tl.constexpr):
    """Add to the logits of some ids, or make them -inf."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PAD)
    ids = tl.load(ids + row * width + at, mask=at < width, other=-1)
    target = logits + row * stride + ids
    if MASK:
        tl.store(target, tl.full([PAD], float("-inf"), tl.float32), mask=ids >= 0)
    else:
        added = tl.load(values + row * width + at, mask=at < width, other=0.0)
        tl.store(target, tl.load(target, mask=ids >= 0, other=0.0) + added, mask=ids >= 0)


def adjust(logits: Tensor, params: SampleParams) -> Tensor:
    """``logits`` after bias, penalties and masks: a float32 copy if there are any."""
    changes = (params.bias, params.penalties, params.masked, params.allowed)
    if all(change is None for change in changes):
        return logits
    out = logits.to(torch.float32, copy=True)
    rows, vocab = out.shape
    if params.bias is not None:
        ids, values = params.bias
        width = ids.shape[1]
        _at_ids[(rows,)](out, ids, values, width, vocab, PAD=power_of_two(width), MASK=False)
    if params.penalties is not None:
        _penalised(out, params.penalties)
    if params.masked is not None:
        width = params.masked.shape[1]
        _at_ids[(rows,)](out, params.masked, out, width, vocab, PAD=power_of_two(width), MASK=True)
    if params.allowed is not None:
        allow(out, *params.allowed)
    return out


def _penalised(logits: Tensor, penalties: Penalties) -> None:
    rows, vocab = logits.shape
    _penalise[(rows, triton.cdiv(vocab, CHUNK))](
        logits,
        penalties.rows,
        penalties.counts,
        penalties.repetition,
        penalties.presence,
        penalties.frequency,
        vocab,
        vocab,
        CHUNK=CHUNK,
        num_warps=4,
    )


class _Row:
    """What is known of each of N rows after one pass over them."""

    def __init__(
        self, logits: Tensor, temperature: Tensor | None, top_k: Tensor | None, sums: bool
    ) -> None:
        rows, vocab = logits.shape
        self.chunks = triton.cdiv(vocab, CHUNK)
        device = logits.device
        hot = temperature is not None
        sums = sums or hot
        # Rounded up, so that each part is aligned alike whatever the batch: kernels are compiled
        # for an alignment.
        aligned = -(-rows // 4) * 4
        self.chunk_peaks, low, mass, hot_mass = torch.empty(4, aligned, self.chunks, device=device)
        self.places = torch.empty(rows, self.chunks, dtype=torch.int32, device=device)
        heat = self.chunk_peaks if temperature is None else temperature
        candidates.chunk_statistics[(rows, self.chunks)](
            logits, heat, self.chunk_peaks, self.places, low, mass, hot_mass,
            vocab, self.chunks, logits.stride(0), CHUNK=CHUNK, SUMS=sums, HOT=hot, num_warps=4,
        )  # fmt: skip
        self.peaks, self.lows, self.floors = torch.empty(3, aligned, device=device)[:, :rows]
        self.masses, self.hot_masses = torch.empty(2, aligned, dtype=torch.float64, device=device)[
            :, :rows
        ]
        self.tokens = torch.empty(rows, dtype=torch.int32, device=device)
        self.counters = torch.empty(rows, dtype=torch.int32, device=device)
        candidates.thresholds[(rows,)](
            self.chunk_peaks, self.places, low, mass, hot_mass, heat,
            self.places if top_k is None else top_k,
            self.tokens, self.peaks, self.lows, self.masses, self.hot_masses, self.floors,
            self.counters, vocab, self.chunks, PAD=power_of_two(self.chunks), CAPACITY=CAPACITY,
            SUMS=sums, HOT=hot, TOP_K=top_k is not None, num_warps=4,
        )  # fmt: skip


def _drawn(logits: Tensor, params: SampleParams, row: _Row) -> Tensor:
    """Tokens of all rows, int32 [N]."""
    temperature, uniform = params.temperature, params.uniform
    if temperature is None:
        return row.tokens
    assert uniform is not None
    rows, vocab = logits.shape
    keys = torch.empty(rows, 2, CAPACITY, dtype=torch.int64, device=logits.device)
    candidates.collect[(rows, row.chunks)](
        logits, row.chunk_peaks, row.floors, row.counters, keys, vocab, row.chunks,
        logits.stride(0), CHUNK=CHUNK, CAPACITY=CAPACITY, num_warps=4,
    )  # fmt: skip
    pending = torch.empty_like(row.counters)
    kept = torch.empty(2, rows, dtype=torch.float64, device=logits.device)
    filters = [temperature if f is None else f for f in (params.top_k, params.top_p, params.min_p)]
    switches = {
        "TOP_K": params.top_k is not None,
        "TOP_P": params.top_p is not None,
        "MIN_P": params.min_p is not None,
    }
    candidates.draw[(rows,)](
        keys, row.counters, row.floors, row.masses, row.hot_masses, temperature, uniform, *filters,
        row.tokens, pending, kept, vocab, CAPACITY=CAPACITY, **switches, num_warps=8,
    )  # fmt: skip
    settings = [temperature, uniform, *filters]
    search(logits, keys, row, pending, kept, settings, switches, CAPACITY, BLOCK)
    return row.tokens


def sample(logits: Tensor, params: SampleParams) -> Sampled:
    """`pagedd_kernels.sample`.

    Typical-p needs the entropy of what top-k left and another order of the tokens: batches in which
    anybody asks for it are sorted whole.
    """
    if params.typical_p is not None:
        return sample_by_sorting(logits, params)
    adjusted = adjust(logits, params)
    row = _Row(adjusted, params.temperature, params.top_k, params.logprobs >= 0)
    tokens = _drawn(adjusted, params, row)
    drawn = Sampled(tokens)
    if params.logprobs >= 0:
        raw = row if adjusted is logits else _Row(logits, None, None, True)
        drawn = Sampled(*likelihoods(logits, raw, tokens, params.logprobs, CHUNK))
    if params.penalties is not None:
        count(params.penalties, drawn.tokens)
    return drawn
