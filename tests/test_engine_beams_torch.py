"""Beam search on the torch backend against transformers: the same texts, scores and order."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pagedd_daemon.models.decoder import Decoder
from pagedd_daemon.params import BeamParams, EarlyStopping, StopParams
from tests.support.answers import Ask, Asking
from tests.support.hf_models import write_model
from tests.support.paged_backend import tiny_backend

STOPS = (2, 7, 8, 9, 20, 21)


@dataclass(frozen=True)
class Models:
    ours: Decoder
    theirs: Any


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder: Path = tmp_path_factory.mktemp("beams")
    reference = write_model("llama", folder).double()
    ours = Decoder.load(folder, torch.device("cpu"), torch.float64, context_tokens=256)
    return Models(ours, reference)


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(30, 160, (length,), generator=generator).tolist()


@pytest.mark.parametrize(
    ("width", "n", "penalty", "early_stopping", "stops", "min_tokens"),
    [
        (4, 4, 1.0, True, STOPS, 0),
        (4, 4, 1.0, False, STOPS, 0),
        (4, 4, 1.0, "never", STOPS, 0),
        (3, 2, 0.0, "never", STOPS, 4),
        (5, 5, 2.0, False, STOPS[:1], 0),
        (2, 1, -0.5, "never", STOPS[:2], 0),
        (16, 16, 0.7, False, STOPS, 0),
        (4, 3, 1.0, True, (2,), 8),
    ],
)
def test_the_texts_are_those_of_generate(
    models: Models,
    width: int,
    n: int,
    penalty: float,
    early_stopping: EarlyStopping,
    stops: tuple[int, ...],
    min_tokens: int,
) -> None:
    length = 37
    ids = prompt(width, length)
    with torch.inference_mode():
        wanted = models.theirs.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, length, dtype=torch.long),
            num_beams=width,
            num_return_sequences=n,
            do_sample=False,
            max_new_tokens=16,
            min_new_tokens=min_tokens or None,
            length_penalty=penalty,
            early_stopping=early_stopping,
            eos_token_id=list(stops),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    with closing(tiny_backend(models.ours)) as backend:
        beams = BeamParams(width, penalty, early_stopping)
        stop = StopParams(max_tokens=16, min_tokens=min_tokens, stop_token_ids=stops)
        (answer,) = Asking(backend).all([Ask(ids, n, stop=stop, beams=beams)])
    for text, row in zip(answer.texts, wanted.sequences[:, length:].tolist(), strict=True):
        end = next((at for at, token in enumerate(row) if token in stops), len(row))
        assert text.tokens == row[:end]
        assert text.reason == ("stop" if end < len(row) else "length")
    scores = [text.score for text in answer.texts]
    assert scores == pytest.approx(wanted.sequences_scores.tolist(), rel=1e-6)
