"""Reference of sampling: every row sorted, in float64. Works on any device and reads nothing back.

The order of the steps and each rule for ties are those of the daemon's NumPy sampler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagedd_kernels.params import Penalties, Sampled, SampleParams

LARGEST = 3e38
"""What penalties near 0 may make of a logit: still a float32."""


def sample(logits: Tensor, params: SampleParams) -> Sampled:
    """Reference of `pagedd_kernels.sample`."""
    adjusted = adjust(logits, params)
    tokens = draw(adjusted, params)
    scored = params.logprobs >= 0
    logprobs, top_tokens, top_logprobs = None, None, None
    if scored:
        raw = logits.double()
        tokens = torch.where(torch.isfinite(raw.amax(-1)), tokens, -1)
        logs = raw.log_softmax(-1)
        logprobs = logs.gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1).float()
        if params.logprobs:
            ordered = raw.sort(dim=-1, descending=True, stable=True).indices[:, : params.logprobs]
            top_tokens = ordered.to(torch.int32)
            top_logprobs = logs.gather(-1, ordered).float()
    tokens = tokens.to(torch.int32)
    if params.penalties is not None:
        count(params.penalties, tokens)
    return Sampled(tokens, logprobs, top_tokens, top_logprobs)


def adjust(logits: Tensor, params: SampleParams) -> Tensor:
    """A copy of ``logits`` in float32 after bias, penalties and masks, in this order."""
    row = logits.to(torch.float32, copy=True)
    if params.bias is not None:
        ids, values = params.bias
        row.scatter_add_(-1, ids.clamp(min=0).long(), values.where(ids >= 0, 0.0))
    if params.penalties is not None:
        row = _penalised(row, params.penalties)
    if params.masked is not None:
        hidden = torch.zeros_like(row, dtype=torch.int32)
        ones = (params.masked >= 0).to(torch.int32)
        hidden.scatter_add_(-1, params.masked.clamp(min=0).long(), ones)
        row.masked_fill_(hidden > 0, -torch.inf)
    if params.allowed is not None:
        rows, words = params.allowed
        ids = torch.arange(row.shape[1], device=row.device)
        bits = words[rows.clamp(min=0).long()][:, ids >> 5] >> (ids & 31).to(torch.int32)
        row.masked_fill_(((bits & 1) == 0) & (rows >= 0).unsqueeze(-1), -torch.inf)
    return row


def _penalised(row: Tensor, penalties: Penalties) -> Tensor:
    seen = penalties.counts[penalties.rows.clamp(min=0).long()]
    generated = (seen >> 1).double()
    repetition = penalties.repetition.double().unsqueeze(-1)
    values = row.double()
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - generated * penalties.frequency.double().unsqueeze(-1)
    values = values - (generated > 0) * penalties.presence.double().unsqueeze(-1)
    changes = (seen > 0) & (penalties.rows >= 0).unsqueeze(-1)
    return torch.where(changes, values.clamp(-LARGEST, LARGEST).float(), row)


def count(penalties: Penalties, tokens: Tensor) -> None:
    """Take the drawn ``tokens`` (int32 [N]) into the table of counts, in place."""
    vocab = penalties.counts.shape[1]
    counted = (penalties.rows >= 0) & (tokens >= 0)
    at = penalties.rows.clamp(min=0).long() * vocab + tokens.clamp(min=0).long()
    penalties.counts.view(-1).scatter_add_(0, at, counted.to(torch.int32) * 2)


def draw(logits: Tensor, params: SampleParams) -> Tensor:
    """Token of each row, int64 [N]; -1 where its largest logit is not a finite number."""
    if params.temperature is None:
        # argmax takes the first of equals, and a NaN for the largest.
        tokens, peak = logits.argmax(-1), logits.amax(-1)
        return torch.where(torch.isfinite(peak), tokens, -1)
    assert params.uniform is not None
    values, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    peak = values[:, :1]
    kept = _kept(values, params)
    first = _first(values, kept)
    greedy = params.temperature <= 0
    temperature = params.temperature.double().where(~greedy, 1.0).unsqueeze(-1)
    mass = (torch.exp((values - first) / temperature) * kept).cumsum(-1)
    reached = (mass >= params.uniform.double().unsqueeze(-1) * mass[:, -1:]) & kept
    at = reached.to(torch.int8).argmax(-1, keepdim=True)
    at = at.where(~greedy.unsqueeze(-1), 0)
    tokens = ids.gather(-1, at).squeeze(-1)
    return torch.where(torch.isfinite(peak).squeeze(-1), tokens, -1)


def _first(values: Tensor, kept: Tensor) -> Tensor:
    """The largest value that is kept, [N, 1]."""
    return values.masked_fill(~kept, -torch.inf).amax(-1, keepdim=True)


def _kept(values: Tensor, params: SampleParams) -> Tensor:
    """Which of the sorted ``values`` may be drawn: top-k, typical-p, top-p, min-p."""
    kept = values > -torch.inf
    rank = torch.arange(values.shape[1], device=values.device)
    if params.top_k is not None:
        k = params.top_k.where(params.top_k > 0, values.shape[1]).unsqueeze(-1)
        kept &= rank < k
    if params.typical_p is not None:
        kept &= _typical(values, kept, params.typical_p.double().unsqueeze(-1))
    if params.top_p is not None:
        share = params.top_p.double().unsqueeze(-1)
        mass = torch.exp(values - _first(values, kept)) * kept
        before = mass.cumsum(-1)
        # The smallest prefix whose mass is at least the share: those before which it is not there.
        inside = (before - mass < share * before[:, -1:]) | (rank == kept.int().argmax(-1)[:, None])
        kept &= inside | (share >= 1.0)
    if params.min_p is not None:
        floor = _first(values, kept) + params.min_p.double().log().unsqueeze(-1)
        kept &= (values >= floor) | (values == _first(values, kept))
    return kept


def _typical(values: Tensor, kept: Tensor, share: Tensor) -> Tensor:
    """Locally typical sampling (arXiv 2202.00666): the tokens whose surprise is nearest to the
    entropy, until their mass exceeds the share; at least one."""
    logs = values.masked_fill(~kept, -torch.inf).log_softmax(-1)
    mass = logs.exp()
    entropy = -(mass * logs).nan_to_num(nan=0.0).sum(-1, keepdim=True)
    order = (-logs - entropy).abs().sort(dim=-1, stable=True).indices
    total = mass.gather(-1, order).cumsum(-1)
    end = (total <= share).sum(-1, keepdim=True) + 1
    rank = torch.arange(values.shape[1], device=values.device)
    inside = torch.zeros_like(kept).scatter(-1, order, rank < end)
    return inside | (share >= 1.0)
