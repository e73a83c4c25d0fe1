"""The packaged model in the decoder against llama.cpp, both in float32 from the same weights."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from pagedd_daemon.helper.vocabulary import LlamaVocabulary
from pagedd_daemon.models.decoder import Decoder
from pagedd_daemon.models.gguf_header import read_header
from tests.support.f32_model import f32_copy
from tests.support.paged import PagedSequences
from tests.support.plain_llama import PlainLlama

SEQUENCES, TOKENS = 8, 256
"""2,048 positions."""


@pytest.mark.model
@pytest.mark.slow
def test_the_packaged_model_agrees_with_llama_cpp_on_the_likeliest_token(
    smollm2_path: Path,
) -> None:
    threads = len(os.sched_getaffinity(0))
    texts = some_texts(smollm2_path)
    with closing(PlainLlama(f32_copy(smollm2_path), threads)) as plain:
        theirs = np.stack([plain.logits(text) for text in texts])
    decoder = Decoder.load(smollm2_path, torch.device("cpu"), torch.float32, context_tokens=TOKENS)
    run = PagedSequences(decoder, [TOKENS] * SEQUENCES)
    ours = run.step(dict(enumerate(texts)), every=True).numpy().reshape(theirs.shape)
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    with closing(PlainLlama(smollm2_path, threads)) as quantised:
        shipped = np.stack([quantised.logits(text) for text in texts[:1]])
    against_shipped = float((ours[:1].argmax(-1) == shipped.argmax(-1)).mean())
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(
        f"\ntop-1 agreement: {agreement:.4f} with F32 (largest difference {worst:.1e}), "
        f"{against_shipped:.4f} with Q4_1 as llama.cpp computes it"
    )
    assert agreement >= 0.999
    assert against_shipped >= 0.9


def some_texts(path: Path) -> list[list[int]]:
    """Half of them English, half of them no language at all, where the likeliest token is one of
    many."""
    vocabulary = LlamaVocabulary(read_header(path))
    words = vocabulary.encode((Path(__file__).parents[1] / "LICENSE").read_bytes(), special=False)
    vocabulary.close()
    half = SEQUENCES // 2
    assert len(words) >= half * TOKENS
    english = [list(words[i * TOKENS : (i + 1) * TOKENS]) for i in range(half)]
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(0, vocabulary.size, (SEQUENCES - half, TOKENS), generator=generator)
    return [*english, *noise.tolist()]
