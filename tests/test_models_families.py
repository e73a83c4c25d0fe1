"""The decoder against transformers: the same logits and the same tokens for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pagedd_daemon.models.decoder import Decoder
from tests.support.hf_models import MODELS, write_model
from tests.support.paged import PagedSequences, greedy

CPU = torch.device("cpu")
LENGTHS = (1, 5, 16, 37, 48)


def prompts(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 160, (n,), generator=generator).tolist() for n in LENGTHS]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference = write_model(name, tmp_path)
    decoder = Decoder.load(tmp_path, CPU, torch.float32, context_tokens=64)
    texts = prompts(seed=1)
    with torch.inference_mode():
        wanted = torch.cat([reference(torch.tensor([ids])).logits[0] for ids in texts])
    run = PagedSequences(decoder, LENGTHS)
    logits = run.step(dict(enumerate(texts)), every=True)
    assert difference(logits, wanted) <= 1e-5
    with torch.inference_mode():
        tokens = reference.generate(
            torch.tensor([texts[3]]),
            attention_mask=torch.ones(1, LENGTHS[3], dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=-1,
        )[0, LENGTHS[3] :].tolist()
    assert greedy(decoder, texts[3], 20, chunk=7) == tokens
