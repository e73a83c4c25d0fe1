"""Ways of decoding that share memory: the engine over llama.cpp, without processes around it.

Blocks are those of the pager after every step, so peaks are exact.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from benchmarks.decoding import random_prompt
from benchmarks.report import Report, Row
from pagedd_daemon.backends.llama import LlamaBackend
from pagedd_daemon.messages import Configure
from pagedd_daemon.params import BeamParams, SamplingParams, StopParams
from tests.support.answers import Answer, Ask, Asking
from tests.support.cells import used_cells
from tests.support.methods import all_methods, demand_blocks, preempted

_BEAMS = 4
_PROMPT_TOKENS = 500
_OUTPUT_TOKENS = 100
_SHARERS = 8
_SHARED_TOKENS = 1_008
"""A whole number of blocks, so that cells can be counted, too."""
_MOST_S = 900.0
_SMALL_VOCABULARY = 16_000
"""Ids that prompts are made of: ordinary pieces in every vocabulary that is measured here."""


def _backend(model: Path, kv_tokens: int, threads: int, kv_dtype: str = "f16") -> LlamaBackend:
    configure = Configure(
        backend="llama.cpp",
        model_path=str(model),
        model_digest=bytes(32),
        context_tokens=2_048,
        kv_tokens=kv_tokens,
        ram_bytes=1 << 30,
        threads=threads,
        kv_dtype=kv_dtype,
        flash_attention=kv_dtype == "f16",
    )
    return LlamaBackend.load(configure, lambda _: None)


def beams(report: Report, model: Path, threads: int) -> None:
    """The row of blocks that beams take, against requests of their own."""
    source = random.Random(8)
    prompts = [random_prompt(source, _PROMPT_TOKENS) for _ in range(_BEAMS)]
    stop = StopParams(max_tokens=_OUTPUT_TOKENS, ignore_eos=True)
    search = [Ask(prompts[0], _BEAMS, stop=stop, beams=BeamParams(_BEAMS))]
    apart = [Ask(prompt, stop=stop) for prompt in prompts]
    seeds = [SamplingParams(temperature=1.0, seed=seed) for seed in range(_BEAMS)]
    alike = [Ask(prompts[0], 1, sampling, stop) for sampling in seeds]
    peaks = []
    for asks in (search, apart, alike):
        with closing(_backend(model, 4_096, threads)) as backend:
            asking = Asking(backend)
            for ask in asks:
                asking.ask(ask)
            asking.run(most_s=_MOST_S)
            peaks.append(asking.most_blocks)
    what = f"beam {_BEAMS} against {_BEAMS} separate requests: blocks used"
    shape = f"{_PROMPT_TOKENS} tokens in, {_OUTPUT_TOKENS} out; peaks"
    note = f"{shape} of {peaks[0]} and {peaks[1]} blocks"
    report.add(Row(what, peaks[0] / peaks[1], "x", "<= 0.6", note))
    note = f"{shape} of {peaks[0]} and {peaks[2]} blocks: these share the prompt, found as a prefix"
    report.add(Row(f"{what}, of the same prompt", peaks[0] / peaks[2], "x", "", note))


def group_swap(report: Report, model: Path, threads: int) -> None:
    """The rows of a group that is paged out and back."""
    prompt = random_prompt(random.Random(9), _SHARED_TOKENS)
    stop = StopParams(max_tokens=64, ignore_eos=True)
    ask = Ask(prompt, _SHARERS, SamplingParams(temperature=1.0, seed=3), stop)
    with closing(_backend(model, 4_096, threads)) as backend:
        asking = Asking(backend)
        asking.ask(ask)
        scheduler = asking.engine._scheduler
        asking.run(until=lambda: any(s.generated >= 20 for s in scheduler.sequences()))
        scheduler.wake()  # a stretch ends: the pager knows what was computed
        group = list(scheduler.sequences())
        before = used_cells(backend._context), asking.blocks
        scheduler._room.page_out(group[0])
        between = used_cells(backend._context)
        scheduler.plan(0.0)  # lets them in again
        after = used_cells(backend._context), asking.blocks
    what = f"{_SHARERS} that share {_SHARED_TOKENS:,} tokens, swapped out and back"
    note = f"{before[0]:,} before, {between} meanwhile, {after[0]:,} after"
    report.add(Row(f"{what}: cells used", after[0] / before[0], "x", "<= 1", note))
    note = f"{before[1]} before, {after[1]} after, a block for the next token of each included"
    report.add(Row(f"{what}: blocks used", after[1], "blocks", f"<= {before[1] + _SHARERS}", note))


def all_together(report: Report, model: Path, threads: int, gap: float) -> None:
    """The row of a batch of all ways of decoding in a pool at a quarter of what they ask for.

    Args:
        report: Gets the row.
        model: In F32, which is computed with F32 keys and values and without flash attention.
        threads: Of llama.cpp.
        gap: Where the two best logits, or the scores of two searches, lie nearer, texts may part.
    """
    asks = all_methods(_SMALL_VOCABULARY)
    need = demand_blocks(asks)
    with closing(_backend(model, 32 * need, threads, "f32")) as backend:
        plain = _run(Asking(backend), asks)
    with closing(_backend(model, 4 * need, threads, "f32")) as backend:
        asking = Asking(backend)
        pressed = _run(asking, asks)
        times = preempted(asking)
    count = sum(len(answer.texts) for answer in plain)
    same = sum(_same(a, b, gap) for a, b in zip(pressed, plain, strict=True))
    note = (
        f"{len(asks)} requests at once: greedy, sampled, n, beams, a shared prefix, scores;"
        f" {need} blocks asked for, {need // 4} there; {times} times paged out"
    )
    what = "pool at a quarter of demand, ways of decoding, F32: texts as unpressed"
    report.add(Row(what, same, "texts", f"== {count}", note))


def _run(asking: Asking, asks: Sequence[Ask]) -> list[Answer]:
    rids = [asking.ask(ask) for ask in asks]
    asking.run(most_s=_MOST_S)
    return [asking.answers[rid] for rid in rids]


def _same(pressed: Answer, plain: Answer, gap: float) -> int:
    """Texts that agree, up to where a tie, if any, parts them."""
    same = 0
    for mine, theirs in zip(pressed.texts, plain.texts, strict=True):
        if mine.tokens == theirs.tokens:
            same += 1
        elif mine.score is not None and theirs.score is not None:
            same += abs(mine.score - theirs.score) <= gap
        elif theirs.logprobs and theirs.logprobs[0][1]:
            pairs = enumerate(zip(mine.tokens, theirs.tokens, strict=True))
            first = next(at for at, (a, b) in pairs if a != b)
            (_, best), (_, second) = theirs.logprobs[first][1][:2]
            same += best - second <= gap
    return same
