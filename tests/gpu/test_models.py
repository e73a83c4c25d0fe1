"""Models on a CUDA device: the same weights as on the CPU, and the same logits but for rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.made_models import llama_8b, write_gguf
from pagedd_daemon.models.config import LayerAttention, Rope
from pagedd_daemon.models.decoder import Decoder
from pagedd_daemon.models.dequant import DEQUANTISERS
from pagedd_daemon.models.model import read_model
from pagedd_daemon.models.weights import load_weights
from tests.support.blocks import random_blocks
from tests.support.hf_models import MODELS, write_model
from tests.support.paged import PagedSequences

pytestmark = pytest.mark.gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LENGTHS = (1, 16, 37, 60)


@pytest.mark.parametrize("kind", DEQUANTISERS)
def test_blocks_decode_to_the_numbers_of_the_cpu(kind: str) -> None:
    blocks = torch.from_numpy(random_blocks(kind, 5000, seed=3))
    decoded = DEQUANTISERS[kind](blocks.to(CUDA)).cpu()
    assert torch.equal(decoded, DEQUANTISERS[kind](blocks))


@pytest.mark.parametrize("name", MODELS)
def test_folders_load_as_on_the_cpu(name: str, tmp_path: Path) -> None:
    write_model(name, tmp_path)
    there, here = (load_weights(read_model(tmp_path), d, torch.bfloat16) for d in (CUDA, CPU))
    assert there.keys() == here.keys()
    for key, weight in here.items():
        assert torch.equal(there[key].cpu(), weight), key


def test_a_quantised_file_loads_as_on_the_cpu(tmp_path: Path) -> None:
    shape = replace(
        llama_8b(layers=2),
        vocab_size=40_000,
        width=1024,
        hidden_width=2048,
        heads=8,
        kv_heads=2,
        attention=(LayerAttention(Rope(500_000.0, 128)),) * 2,
    )
    path = tmp_path / "made.gguf"
    write_gguf(shape, path)
    there, here = (load_weights(read_model(path), d, torch.bfloat16) for d in (CUDA, CPU))
    for key, weight in here.items():
        assert torch.equal(there[key].cpu(), weight), key


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_references_but_for_rounding(name: str, tmp_path: Path) -> None:
    write_model(name, tmp_path)
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randint(3, 160, (n,), generator=generator).tolist() for n in LENGTHS]
    logits = []
    for device, dtype in ((CUDA, torch.bfloat16), (CPU, torch.bfloat16), (CPU, torch.float32)):
        decoder = Decoder.load(tmp_path, device, dtype, context_tokens=64)
        run = PagedSequences(decoder, [n + 1 for n in LENGTHS])
        prompt = run.step(dict(enumerate(texts)), every=True)
        decoded = run.step({i: [5] for i in range(len(LENGTHS))})
        logits.append(torch.cat([prompt, decoded]).float().cpu())
    cuda, rounded, exact = logits
    # As far from the truth as bf16 on the CPU is, and no further.
    bound = (rounded - exact).square().mean().sqrt()
    assert (cuda - exact).square().mean().sqrt() <= 1.5 * bound
    assert bool(cuda.isfinite().all())


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3", "phi3-longrope"])
def test_a_decode_step_can_be_captured_and_replayed(name: str, tmp_path: Path) -> None:
    write_model(name, tmp_path)
    decoder = Decoder.load(tmp_path, CUDA, torch.bfloat16, context_tokens=64)
    run = PagedSequences(decoder, [n + 2 for n in LENGTHS])
    run.step({i: list(range(3, 3 + n)) for i, n in enumerate(LENGTHS)})
    batch = run.batch({i: [7] for i in range(len(LENGTHS))}, every=False)
    with torch.inference_mode():
        wanted = decoder.forward(batch, run.kv).clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = decoder.forward(batch, run.kv)
        logits.zero_()
        graph.replay()
    assert torch.equal(logits, wanted)
