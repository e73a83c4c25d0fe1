"""Output constrained by random JSON schemas against free text of the same lengths."""

from __future__ import annotations

import json
import random
import time
from contextlib import closing

from benchmarks.gpu.engine_loop import Loop, Request, prompts
from benchmarks.gpu.model8b import backend_8b, late_compiles
from benchmarks.report import Report, Row
from benchmarks.schemas import random_schema, valid
from pagedd_daemon.backends.base import Capabilities
from pagedd_daemon.engine.grammar import Grammars
from pagedd_daemon.front.detokenizer import pack_ids
from pagedd_daemon.messages import Configure

BATCH = 32
SCHEMAS = 1000
PROMPT = 64
MOST = 400
"""Tokens of a text; all end long before."""
EOG = 128_001


def piece(token: int) -> bytes:
    """Ids below 256 are bytes, and all others are words, which random weights do write."""
    return bytes([token]) if token < 256 else b"w%dx" % token


def byte_grammars(caps: Capabilities) -> Grammars:
    """Over the vocabulary of `piece`."""
    pieces = [b"" if n in caps.eog_tokens else piece(n) for n in range(caps.vocab_size)]
    configure = Configure(
        "torch", "", bytes(32), 0, 0, 0, 1,
        piece_lengths=pack_ids([len(piece) for piece in pieces]), pieces=b"".join(pieces),
    )  # fmt: skip
    return Grammars(configure, caps)


def run_all(loop: Loop, requests: list[Request], batch: int) -> float:
    """Run them, ``batch`` at any time; tokens per second."""
    waiting = list(reversed(requests))
    live: list[Request] = []
    begin = time.monotonic()
    while waiting or live:
        live = [request for request in live if not request.reason]
        while waiting and len(live) < batch:
            live.append(waiting.pop())
            loop.submit(live[-1], temperature=1.0, seed=len(waiting))
        if loop.engine.has_work:
            loop.turn()
    return sum(len(request.tokens) for request in requests) / (time.monotonic() - begin)


def schema_requests(count: int, vocab: int) -> tuple[list[dict[str, object]], list[Request]]:
    """Random schemas, and a request for each."""
    source = random.Random(5)
    schemas = [random_schema(source) for _ in range(count)]
    texts = prompts(count, PROMPT, vocab, 1)
    made = [Request(p, MOST, schema=json.dumps(s)) for p, s in zip(texts, schemas, strict=True)]
    return schemas, made


def matched(schemas: list[dict[str, object]], requests: list[Request]) -> int:
    """How many ended by themselves with a text that matches."""
    return sum(
        request.reason == "stop" and valid(json.loads(b"".join(map(piece, request.tokens))), schema)
        for schema, request in zip(schemas, requests, strict=True)
    )


def constrained(report: Report) -> None:
    """The stage."""
    backend, _ = backend_8b(eog_tokens=frozenset({EOG}))
    with closing(byte_grammars(backend.capabilities)) as grammars:
        loop = Loop(backend, grammars)
        vocab = backend.capabilities.vocab_size
        run_all(loop, schema_requests(BATCH, vocab)[1], BATCH)
        schemas, requests = schema_requests(SCHEMAS, vocab)
        rate = run_all(loop, requests, BATCH)
    share = 100 * matched(schemas, requests) / SCHEMAS
    lengths = [max(1, len(request.tokens)) for request in requests]
    free = [Request(p, n) for p, n in zip(prompts(SCHEMAS, PROMPT, vocab, 2), lengths, strict=True)]
    free_rate = run_all(loop, free, BATCH)
    note = f"{SCHEMAS:,} random schemas, {sum(lengths)} tokens"
    report.add(Row("constrained texts that are valid and ended", share, "%", ">= 100", note))
    slower = 100 * (1 - rate / free_rate)
    note = f"batch {BATCH}: {rate:,.0f} tok/s, free {free_rate:,.0f}; compiling included"
    report.add(Row("constrained output, slower than free text", slower, "%", "<= 5", note))
    late_compiles(report, backend)
    backend.close()
