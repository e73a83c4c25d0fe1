"""What must be right before a figure is worth anything: the engine on CUDA against the CPU."""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.gpu.engine_loop import Loop, Request, prompts
from benchmarks.gpu.model8b import late_compiles
from benchmarks.report import Report, Row
from kvpager.types import CopyBlock, Load, Page, Store, Tier
from pagedd_daemon.backends.base import Draw, Run, Step
from pagedd_daemon.backends.paged.backend import PagedBackend
from pagedd_daemon.backends.paged.load import Wishes, serve
from pagedd_daemon.engine.sampler import Sampler
from pagedd_daemon.models.config import ModelConfig, Rope, uniform_attention
from pagedd_daemon.models.decoder import Decoder
from pagedd_daemon.params import SamplingParams, StopParams

VOCAB, CONTEXT = 4096, 4096


def config() -> ModelConfig:
    """Four layers, wide enough for every kernel's real shapes."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=VOCAB,
        width=512,
        hidden_width=1024,
        heads=8,
        kv_heads=2,
        head_dim=64,
        context_tokens=CONTEXT,
        norm_eps=1e-5,
        attention=uniform_attention(Rope(10_000.0, 64), [0] * 4),
        attention_scale=0.125,
    )


def models() -> tuple[Decoder, Decoder]:
    """The same weights: bf16 on CUDA, and the same numbers in float32 on the CPU."""
    cuda = Decoder.random(config(), torch.device("cuda", 0), torch.bfloat16, 3)
    cpu = Decoder.random(config(), torch.device("cpu"), torch.float32, 3)
    pairs = [(cuda.embedding, cpu.embedding), (cuda.head, cpu.head)]
    pairs += [(cuda.final_norm, cpu.final_norm)]
    names = ("input_norm", "qkv", "out", "mlp_norm", "gate_up", "down")
    for ours, theirs in zip(cuda.layers, cpu.layers, strict=True):
        pairs += [(getattr(ours, name), getattr(theirs, name)) for name in names]
    for source, target in pairs:
        target.copy_(source.float().cpu())
    return cuda, cpu


def _texts(backend: PagedBackend, lengths: list[int], output: int) -> list[list[int]]:
    loop = Loop(backend)
    texts = [prompts(1, n, VOCAB, seed)[0] for seed, n in enumerate(lengths)]
    requests = [Request(text, output) for text in texts]
    for request in requests:
        loop.submit(request)
    loop.run()
    return [request.tokens for request in requests]


def _gaps(cpu: PagedBackend, prompt: list[int], text: list[int]) -> float:
    """How far below the best logit the text's tokens are on the CPU, at most."""
    table = np.arange(-(-(len(prompt) + len(text)) // 16), dtype=np.int32)
    worst, start = 0.0, 0
    tokens = np.array(prompt, np.int32)
    for token in text:
        sampler = Sampler(
            SamplingParams(temperature=0.0, logprobs=1, logit_bias={}),
            StopParams(max_tokens=1),
            index=0,
            prompt=tokens,
            vocab_size=VOCAB,
            eog_tokens=frozenset(),
        )
        forced = Sampler(
            SamplingParams(temperature=0.0, logprobs=1, logit_bias={token: 1e4}),
            StopParams(max_tokens=1),
            index=0,
            prompt=tokens,
            vocab_size=VOCAB,
            eog_tokens=frozenset(),
        )
        run = Run(1, start, tokens, table, [Draw(1, sampler), Draw(1, forced)])
        best, ours = (one for _, one in cpu.collect(cpu.launch(Step(1, [run]))).drawn)
        assert ours.token == token
        assert best.logprob is not None
        assert ours.logprob is not None
        worst = max(worst, best.logprob - ours.logprob)
        start += len(tokens)
        tokens = np.array([token], np.int32)
    return worst


def texts_against_cpu(report: Report) -> None:
    """Every token the CUDA engine takes is all but the best on the CPU, in any batch."""
    cuda, cpu = models()
    backend = serve(cuda, Wishes(kv_tokens=65536, ram_bytes=1 << 30))
    reference = serve(cpu, Wishes(kv_tokens=8192))
    lengths = [1, 15, 16, 17, 100, 511, 700, 1300]
    alone = [_texts(backend, lengths[: at + 1], 24)[at] for at in range(len(lengths))]
    together = _texts(backend, lengths, 24)
    worst = 0.0
    for seed, (length, one, two) in enumerate(zip(lengths, alone, together, strict=True)):
        prompt = prompts(1, length, VOCAB, seed)[0].tolist()
        worst = max(worst, _gaps(reference, prompt, one), _gaps(reference, prompt, two))
    report.add(
        Row(
            "tokens on CUDA (bf16): furthest below the best logit on the CPU (float32)",
            worst,
            "nat",
            "<= 0.35",
            "8 prompts of 1 to 1,300 tokens, alone and together, 24 tokens each",
        )
    )
    _many_streams(report, backend)
    _pages(report, backend)
    _shrinks(report, backend, lengths, together)
    late_compiles(report, backend)
    backend.close()
    reference.close()


def _many_streams(report: Report, backend: PagedBackend) -> None:
    """256 sampled streams: the draw of a request does not depend on who else is there."""
    loop = Loop(backend)
    texts = prompts(300, 40, VOCAB, 99)
    requests = [Request(text, 20) for text in texts]
    for at, request in enumerate(requests):
        loop.submit(request, temperature=0.9, top_p=0.95, seed=at, presence_penalty=0.3 * (at % 2))
    loop.run()
    complete = sum(len(request.tokens) == 20 for request in requests)
    report.add(Row("300 sampled streams that got all their tokens", complete, "", "== 300"))


def _pages(report: Report, backend: PagedBackend) -> None:
    """Pages go to RAM and come back to other blocks, bit for bit, behind copies and steps."""
    kv = backend._arena.kv
    count = 512
    kv[1 : 2 * count + 1] = torch.randn_like(kv[1 : 2 * count + 1])
    torch.cuda.synchronize()
    before = kv[1 : count + 1].clone()
    order = np.random.default_rng(1).permutation(count).tolist()
    store = Store(1, 1, Tier.RAM, tuple(Page(at, at, slot, 16) for at, slot in enumerate(order)))
    backend.apply([CopyBlock(1, 0, at, count + at, 16) for at in range(count)])
    backend.apply([store])
    _wait(backend, 1)
    kv[1 : count + 1].zero_()
    torch.cuda.synchronize()
    back = tuple(Page(at, count - 1 - at, slot, 16) for at, slot in enumerate(order))
    backend.apply([Load(2, 1, Tier.RAM, back)])
    _wait(backend, 2)
    wrong = int((kv[1 : count + 1].flip(0) != before).flatten(1).any(1).sum())
    wrong += int((kv[count + 1 : 2 * count + 1] != before).flatten(1).any(1).sum())
    report.add(Row("pages of 512 copied, stored and loaded that differ", wrong, "", "== 0"))


def _wait(backend: PagedBackend, transfer: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for ended in backend.poll_transfers():
            assert ended.ok
            if ended.transfer == transfer:
                return
        time.sleep(1e-3)
    raise TimeoutError(f"transfer {transfer} did not end")


def _shrinks(
    report: Report, backend: PagedBackend, lengths: list[int], expected: list[list[int]]
) -> None:
    """After shrinking and growing the pool, graphs and kernels compute as before."""
    loop = Loop(backend)
    scheduler = loop.engine._scheduler
    free = torch.cuda.mem_get_info()[0]
    blocks = backend.capabilities.gpu_blocks
    scheduler.resize(blocks // 4)
    given = torch.cuda.mem_get_info()[0] - free
    backend.grow(blocks)
    scheduler.resize(blocks)
    same = sum(a == b for a, b in zip(_texts(backend, lengths, 24), expected, strict=True))
    report.add(Row("memory given back by a pool of 4,096 blocks", given / 2**20, "MiB", "> 0"))
    report.add(Row("texts of 8 that are the same after it grew again", same, "", ">= 7"))
