"""Log-probabilities of prompts: what follows each token of a chunk, scored on the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagedd_daemon.backends.base import Run
from pagedd_daemon.engine.sampler import Drawn
from pagedd_kernels import SampleParams, sample


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Scores of some runs, on their way to the host. Tensors have one row per token."""

    runs: Sequence[Run]
    logprobs: Tensor
    tops: tuple[Tensor, Tensor] | None

    def read(self) -> Iterator[tuple[int, list[Drawn]]]:
        """``(seq, scores)`` of each run; what was sent must have arrived."""
        values = self.logprobs.tolist()
        ids, likely = [top.tolist() for top in self.tops] if self.tops is not None else ([], [])
        at = 0
        for run in self.runs:
            assert run.follows is not None
            scores = []
            for token in run.follows.tolist():
                top: tuple[tuple[int, float], ...] = ()
                if run.top:
                    top = tuple(zip(ids[at][: run.top], likely[at][: run.top], strict=True))
                sound = not math.isnan(values[at])
                scores.append(Drawn(token, values[at], top) if sound else Drawn(-1))
                at += 1
            yield run.seq, scores


def score_prompts(logits: Tensor, runs: Sequence[Run]) -> PromptScores:
    """Begin to score what follows in the prompts of ``runs``.

    Args:
        logits: ``[N, vocab]``, N at least the tokens that follow; theirs come first, in the order
            of the runs.
        runs: All of them have `Run.follows`.
    """
    cuda = logits.device.type == "cuda"
    parts = [run.follows for run in runs if run.follows is not None]
    following = torch.from_numpy(np.concatenate(parts).astype(np.int64))
    if cuda:
        following = following.pin_memory().to(logits.device, non_blocking=True)
    rows = logits[: len(following)]
    found = sample(rows, SampleParams(logprobs=max(run.top for run in runs)))
    assert found.logprobs is not None
    # The best token's log-probability says what all of a row sums up to.
    best = rows.gather(-1, found.tokens.clamp(min=0).long().unsqueeze(-1)).squeeze(-1).double()
    mine = rows.gather(-1, following.unsqueeze(-1)).squeeze(-1).double()
    values = (mine - best + found.logprobs).masked_fill(found.tokens < 0, torch.nan)
    tops = None
    if found.top_tokens is not None and found.top_logprobs is not None:
        tops = _send(found.top_tokens), _send(found.top_logprobs)
    return PromptScores(runs, _send(values), tops)


def _send(values: Tensor) -> Tensor:
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.device.type == "cuda")
    return host.copy_(values, non_blocking=True)


def joined(parts: Iterable[PromptScores]) -> list[tuple[int, list[Drawn]]]:
    """The scores of a step by run; those of a run that was computed in pieces are one again."""
    whole: list[tuple[int, list[Drawn]]] = []
    for part in parts:
        for seq, scores in part.read():
            if whole and whole[-1][0] == seq:
                whole[-1][1].extend(scores)
            else:
                whole.append((seq, scores))
    return whole
