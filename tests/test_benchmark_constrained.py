"""What the stage `constrained` of bench-gpu measures is what it says."""

from __future__ import annotations

from contextlib import closing

from benchmarks.gpu.constrained import byte_grammars, matched, run_all, schema_requests
from benchmarks.gpu.engine_loop import Loop
from pagedd_daemon.backends.paged.load import Wishes, serve
from tests.support.paged_backend import VOCAB, tiny_model


def test_texts_of_random_schemas_match_them_and_end_by_themselves() -> None:
    wishes = Wishes(kv_tokens=4096, eog_tokens=frozenset({256}), asynchronous=True)
    with (
        closing(serve(tiny_model(), wishes)) as backend,
        closing(byte_grammars(backend.capabilities)) as grammars,
    ):
        schemas, requests = schema_requests(24, VOCAB - 1)
        assert run_all(Loop(backend, grammars), requests, 8) > 0
        assert matched(schemas, requests) == 24
