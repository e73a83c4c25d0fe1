"""Samplers of the daemon as tensors, so that drawing on a device can be compared with NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedd_daemon.engine.sampler import Sampler
from pagedd_daemon.params import SamplingParams, StopParams
from pagedd_kernels import Penalties, SampleParams, fill_counts

VOCAB = 400
EOG = frozenset({2, 5})
PROMPT = np.array([7, 9, 9, 30, 31], np.int32)


def sampler(
    *, index: int = 0, stop: StopParams | None = None, vocab: int = VOCAB, **params: Any
) -> Sampler:
    return Sampler(
        SamplingParams(**params),
        stop or StopParams(max_tokens=100),
        index=index,
        prompt=PROMPT,
        vocab_size=vocab,
        eog_tokens=EOG,
    )


def random_logits(
    rng: np.random.Generator, rows: int, spread: float, vocab: int = VOCAB
) -> npt.NDArray[np.float32]:
    """Rounded to quarters, so that ties are common."""
    return (np.round(rng.normal(0, spread, (rows, vocab)) * 4) / 4).astype(np.float32)


def _padded(rows: list[list[Any]], fill: Any, dtype: torch.dtype, device: str) -> Tensor:
    width = max(1, *(len(row) for row in rows)) if rows else 1
    return torch.tensor(
        [row + [fill] * (width - len(row)) for row in rows], dtype=dtype, device=device
    )


def params_of(samplers: list[Sampler], device: str = "cpu") -> SampleParams:
    """What the samplers would do next; everything is on, each row with its own values."""

    def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([getattr(s.params, name) for s in samplers], dtype=dtype, device=device)

    vocab = samplers[0].vocab_size
    counts = torch.zeros(len(samplers), vocab, dtype=torch.int32, device=device)
    rows = torch.full((len(samplers),), -1, dtype=torch.int32, device=device)
    for row, one in enumerate(samplers):
        if one.penalised:
            rows[row] = row
            prompt, made = (torch.from_numpy(ids).to(device) for ids in one.seen())
            fill_counts(counts, row, prompt, made)
    bias = [sorted(s.params.logit_bias.items()) for s in samplers]
    return SampleParams(
        temperature=column("temperature"),
        uniform=torch.tensor([s.uniform() for s in samplers], dtype=torch.float64, device=device),
        top_k=column("top_k", torch.int32),
        top_p=column("top_p", torch.float64),
        min_p=column("min_p", torch.float64),
        typical_p=column("typical_p", torch.float64),
        penalties=Penalties(
            rows,
            counts,
            column("repetition_penalty"),
            column("presence_penalty"),
            column("frequency_penalty"),
        ),
        bias=(
            _padded([[i for i, _ in b] for b in bias], -1, torch.int32, device),
            _padded([[v for _, v in b] for b in bias], 0.0, torch.float32, device),
        ),
        masked=_padded([s.masked().tolist() for s in samplers], -1, torch.int32, device),
        logprobs=max(s.params.logprobs for s in samplers),
    )
