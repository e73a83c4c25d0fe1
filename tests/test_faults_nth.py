"""The n-th step, copy, send, allocation or call of the device fails, for every n of a scenario.

After SQLite's habit: a scenario runs once undisturbed and counts what could fail, then once more
for each of these with that one failing. Whatever it was, the invariants hold, every request ends
exactly once, and who got tokens got those of the undisturbed run. (The disk's reads and writes:
`tests/test_tiers_disk.py`.)
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
import torch

from benchmarks.gpu.engine_loop import Loop, Request
from pagedd_daemon import messages as m
from pagedd_daemon.backends.paged.backend import LEAST_PIECE_TOKENS, PagedBackend
from pagedd_daemon.backends.paged.load import BLOCK_TOKENS, Wishes, serve
from pagedd_daemon.backends.paged.transfers import Transfers
from pagedd_daemon.front import requests as r
from pagedd_daemon.models.decoder import Decoder
from tests.support.front import Client, FakeEngine, Front, run
from tests.support.live_engine import Chance, LiveSource
from tests.support.paged_backend import tiny_model
from tests.test_backend_paged import Faulty
from tests.test_engine_core import Bench, Outcome, prompt_of

# --------------------------------------------------------------- steps and copies of the engine


def small_bench(llama: bool) -> Bench:
    """A pool in which half of the requests fit, and RAM for most of the rest."""
    return Bench(kv_tokens=16 * 16, ram_blocks=24, llama=llama)


def traffic(bench: Bench) -> None:
    """A shared prefix, samples, and more than fits."""
    shared = prompt_of(1, 40)
    for rid in range(5):
        n = 2 if rid == 3 else 1
        bench.submit(rid, shared + prompt_of(10 + rid, 20 + 9 * rid), n=n, max_tokens=14, seed=rid,
                     temperature=0.9 if n > 1 else 0.0)  # fmt: skip
    bench.run()


def ended_once(bench: Bench, wanted: dict[int, Outcome]) -> set[int]:
    """Checks how everybody ended; who was refused."""
    refused = set()
    for rid, outcome in bench.outcomes.items():
        whole = wanted[rid]
        if outcome.rejected is not None:
            assert outcome.closed is None
            assert outcome.rejected.code == "E_ENGINE"
            refused.add(rid)
        else:
            assert outcome.closed is not None
            assert outcome.reasons == whole.reasons
            assert outcome.tokens == whole.tokens
        for index, tokens in outcome.tokens.items():
            assert tokens == whole.tokens[index][: len(tokens)]
    return refused


def holds_nothing(bench: Bench) -> None:
    """The pool is free, and serves whoever comes next."""
    bench.engine.validate()
    assert bench.engine.snapshot().figures["kv"]["gpu"]["used"] == 0
    fresh = Bench(llama=True)
    for one in (bench, fresh):
        one.submit(99, prompt_of(99, 70), max_tokens=5)
        one.run()
    assert bench.outcomes[99].tokens == fresh.outcomes[99].tokens


@pytest.mark.parametrize("llama", [False, True])
@pytest.mark.parametrize("what", ["steps", "transfers"])
def test_whichever_step_or_copy_fails_everybody_ends_once_with_their_text(
    what: str, llama: bool
) -> None:
    plain = small_bench(llama)
    traffic(plain)
    count = plain.backend._steps if what == "steps" else plain.backend._pages.begun
    assert count > (8 if what == "steps" else 3)
    for nth in range(count):
        bench = small_bench(llama)
        getattr(bench.backend.faults, what).add(nth)
        traffic(bench)
        refused = ended_once(bench, plain.outcomes)
        # A copy that fails costs a computation, and nobody a request.
        assert not refused or what == "steps", (nth, refused)
        holds_nothing(bench)


# ------------------------------------------------------------ the front, the link and the engine


async def conversation(chance: Chance) -> dict[str, tuple[str, str]]:
    """Some requests through front and engine: how each ended, and its text."""
    source = LiveSource(chance, blocks=10, ram_pages=20)
    async with Front(source=source) as front:
        client = front.connect()
        shared = "It was a dark and stormy night; the rain fell in torrents"
        asked = {
            client.generate(shared, max_tokens=4, temperature=0, ignore_eos=True): 1,
            client.generate(shared + " and so on", n=2, max_tokens=3, seed=3, ignore_eos=True): 2,
            client.generate("y" * 70, stop=["a", "e", "i"], max_tokens=12, temperature=0): 1,
        }
        gone = client.generate("z" * 30, max_tokens=500, temperature=0, ignore_eos=True)
        await client.until(gone, "chunk")
        front.control(r.Cancel(id="c", token=client.connection.token, target=gone), client)
        ends = {}
        for request, samples in {**asked, gone: 1}.items():
            ends[request] = await ended(client, request, samples)
        await front.status()
        for engine in source.live:
            if not engine.stopped and not engine.status:
                assert not engine.engine.has_work
                engine.engine.validate()
        return ends


async def ended(client: Client, request: str, samples: int) -> tuple[str, str]:
    end = await client.end(request)
    events = client.events(request)
    assert [e["seq"] for e in events] == list(range(len(events)))
    assert sum(e["type"] in ("done", "error") for e in events) == 1
    assert end["type"] == "done", end
    reasons = ",".join(finish["reason"] for finish in end["finish"])
    return reasons, "|".join(client.text(request, index) for index in range(samples))


def test_whichever_send_or_allocation_fails_every_request_ends_once_with_its_text() -> None:
    chance = Chance()
    plain = run(conversation(chance))
    kinds = {what.split()[0] for what in chance.seen}
    assert kinds == {"send", "say", "apply", "launch", "collect", "poll", "commit"}
    for nth, what in enumerate(chance.seen):
        ends = run(conversation(Chance(nth)))
        for request, (reasons, text) in ends.items():
            wanted_reasons, wanted = plain[request]
            assert reasons == wanted_reasons, (nth, what)
            if reasons != "cancelled":  # when that one is met depends on who is first
                assert text == wanted, (nth, what)


class Moment(Chance):
    """Has nothing fail: something else happens when the n-th thing would have."""

    def __init__(self, nth: int, then: Callable[[], object]) -> None:
        super().__init__(nth)
        self._then = then

    def fails(self, what: str) -> bool:
        """Never."""
        if super().fails(what):
            asyncio.get_running_loop().call_soon(self._then)
        return False


async def cancelled(nth: int) -> tuple[int, str]:
    """A request that is cancelled at that moment: how many moments there were, how it ended."""
    client: Client

    def cancel() -> None:
        front.control(r.Cancel(id="c", token=client.connection.token, target="q"), client)

    moment = Moment(nth, cancel)
    source = LiveSource(moment, blocks=10, ram_pages=20)
    async with Front(source=source) as front:
        client = front.connect()
        client.generate("x" * 40, id="q", n=2, max_tokens=4, seed=1, ignore_eos=True)
        reasons, _ = await ended(client, "q", 2)
        await front.status()
        assert not source.live[0].engine.has_work
        source.live[0].engine.validate()
        assert source.live[0].engine.snapshot().figures["kv"]["gpu"]["used"] == 0
        return len(moment.seen), reasons


def test_a_cancel_at_any_moment_ends_the_request_once() -> None:
    moments, reasons = run(cancelled(-1))
    assert reasons == "length,length"
    found = {run(cancelled(nth))[1] for nth in range(moments)}
    assert {"cancelled,cancelled", "length,length"} <= found


def test_an_engine_for_which_there_is_no_memory_costs_a_retryable_error_and_is_tried_again() -> (
    None
):
    async def scenario() -> None:
        async with Front() as front:
            client = front.connect()
            spawn = front.source.spawn

            async def refuse(_: object) -> FakeEngine:
                front.source.spawn = spawn  # type: ignore[method-assign]
                raise OSError(errno.ENOMEM, "Cannot allocate memory")

            front.source.spawn = refuse  # type: ignore[method-assign, assignment]
            error = await client.end(client.generate())
            assert (error["code"], error["retryable"]) == ("E_ENGINE", True)
            client.generate()
            engine = await front.source.engine(0)
            await engine.hears(m.Submit)

    run(scenario())


# ------------------------------------------------------------------------------- the torch engine


class OutOfMemoryOnce(Faulty):
    """A model whose n-th forward pass finds no memory."""

    def __init__(self, model: Decoder, nth: int) -> None:
        super().__init__(model)
        self._nth = nth
        self.calls = 0

    def forward(self, batch: object, kv: torch.Tensor) -> torch.Tensor:
        """See `Decoder`."""
        self.calls += 1
        if self.calls - 1 == self._nth:
            raise torch.OutOfMemoryError("no memory for this one")
        return super().forward(batch, kv)  # type: ignore[arg-type]


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Has the n-th copy between the pool and RAM fail from now on; the copies so far."""
    copy = Transfers._copy

    def arm(nth: int) -> list[int]:
        seen: list[int] = []

        def counted(self: Transfers, job: object) -> None:
            seen.append(len(seen))
            if seen[-1] == nth:
                raise RuntimeError("the copy engine says no")
            copy(self, job)  # type: ignore[arg-type]

        monkeypatch.setattr(Transfers, "_copy", counted)
        return seen

    return arm


def torch_traffic(backend: PagedBackend, output: int = 6) -> list[Request]:
    """More than fits into the pool, through the engine's own loop."""
    loop = Loop(backend)
    shared = np.array(prompt_of(1, 40), np.int32)
    asked = [
        Request(np.concatenate([shared, np.array(prompt_of(n, 8 + 7 * n), np.int32)]), output)
        for n in range(3)
    ]
    for request in asked:
        loop.submit(request)
    loop.run()
    loop.engine.validate()
    assert loop.engine.snapshot().figures["kv"]["gpu"]["used"] == 0
    return asked


def torch_backend(model: object, blocks: int = 8) -> PagedBackend:
    tiny = tiny_model()
    block = BLOCK_TOKENS * tiny.config.kv_bytes_per_token(tiny.dtype.itemsize)
    return serve(model, Wishes(blocks * BLOCK_TOKENS, 16 * block))  # type: ignore[arg-type]


def test_whichever_pass_of_the_torch_engine_finds_no_memory_nobodys_text_changes() -> None:
    model = tiny_model()
    counting = OutOfMemoryOnce(model, -1)
    with closing(torch_backend(counting)) as backend:
        plain = [request.tokens for request in torch_traffic(backend)]
    assert counting.calls > 6
    for nth in range(counting.calls):
        with closing(torch_backend(OutOfMemoryOnce(model, nth))) as backend:
            found = torch_traffic(backend)
            assert [request.tokens for request in found] == plain, nth
            assert backend._piece_tokens >= LEAST_PIECE_TOKENS


def test_whichever_copy_of_the_torch_engine_fails_nobodys_text_changes(
    copies: Callable[[int], list[int]],
) -> None:
    model = tiny_model()
    seen = copies(-1)
    with closing(torch_backend(model, blocks=9)) as backend:
        plain = [request.tokens for request in torch_traffic(backend, 14)]
    assert len(seen) > 1
    for nth in range(len(seen)):
        copies(nth)
        with closing(torch_backend(model, blocks=9)) as backend:
            assert [request.tokens for request in torch_traffic(backend, 14)] == plain, nth
