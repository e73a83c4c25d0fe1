"""Vectors of texts, from the client to the backends."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import llama_cpp
import numpy as np
import numpy.typing as npt
import psutil
import pytest

import pagedd
from kvpager.types import PriorityClass
from pagedd_daemon import messages as m
from pagedd_daemon.backends.simulated import SimulatedBackend
from pagedd_daemon.engine.core import Engine
from pagedd_daemon.params import SamplingParams, StopParams
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.gateway import with_gateway
from tests.support.simulated import simulated


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(model="simulated") as running:
        yield running


# ------------------------------------------------------------------------------------- llama.cpp


def direct(path: Path, text: list[int]) -> npt.NDArray[np.float64]:
    """llama.cpp's own mean over one batch, by its bindings."""
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.embeddings, params.pooling_type = True, llama_cpp.LLAMA_POOLING_TYPE_MEAN
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(512, 0, 1)
    batch.n_tokens = len(text)
    for at, token in enumerate(text):
        batch.token[at], batch.pos[at], batch.logits[at] = token, at, 1
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
    assert llama_cpp.llama_decode(context, batch) == 0
    width = llama_cpp.llama_model_n_embd(model)
    found = ctypes.cast(
        llama_cpp.llama_get_embeddings_seq(context, 0), ctypes.POINTER(ctypes.c_float)
    )
    vector = np.array(found[:width], np.float64)
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return vector


def test_smollm2_gives_the_vectors_that_llama_cpp_gives(smollm2_path: Path) -> None:
    texts = ["A river.", "A stream runs down the hill. " * 40]
    with running_daemon(model=str(smollm2_path)) as daemon, daemon.connect() as client:
        tokens = [client.tokenize(text) for text in texts]
        assert len(tokens[1]) > 256, "it shall be computed in several pieces"
        made = client.embed(texts)
        again = client.embed(tokens, normalize=False)
        assert made.prompt_tokens == sum(map(len, tokens))
    for ids, unit, free in zip(tokens, made.vectors, again.vectors, strict=True):
        wanted = direct(smollm2_path, ids)
        assert len(unit) == len(wanted)
        length = float(np.linalg.norm(wanted))
        assert float(np.dot(unit, wanted)) / length > 0.999
        assert np.linalg.norm(unit) == pytest.approx(1, abs=1e-5)
        assert np.linalg.norm(free) == pytest.approx(length, rel=0.02)


# ------------------------------------------------------------------------- the simulated backend


def test_vectors_come_in_order_and_depend_on_their_own_text_alone(daemon: RunningDaemon) -> None:
    texts = [f"text {number}" * (1 + number % 5 * 8) for number in range(20)]
    with daemon.connect() as client:
        together = client.embed(texts)
        assert together.model == "simulated"
        assert len(together.vectors) == 20
        assert len({tuple(vector) for vector in together.vectors}) == 20
        for at in (0, 7, 19):
            assert client.embed(texts[at]).vectors == [together.vectors[at]]
        ids = [client.tokenize(text) for text in texts]
        assert client.embed(ids).vectors == together.vectors
        assert together.prompt_tokens == sum(map(len, ids))


def test_embedding_goes_on_beside_streams_and_is_charged_to_its_app(daemon: RunningDaemon) -> None:
    text = "x" * 300
    with daemon.connect("embeds") as client, daemon.connect("talks") as other:
        with other.generate("hello", max_tokens=2000, ignore_eos=True, seed=1) as stream:
            next(iter(stream))
            made = client.embed([text] * 3)
        assert made.prompt_tokens == 3 * len(client.tokenize(text))
        (row,) = [row for row in client.status()["apps"] if row["app"] == "embeds"]
        assert row["prompt_tokens"] == made.prompt_tokens


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"inputs": []}, "E_FIELD"),
        ({"inputs": [""]}, "E_FIELD"),
        ({"inputs": [[]]}, "E_FIELD"),
        ({"inputs": ["x"] * 129}, "E_LIMIT"),
        ({"inputs": "x" * 9000}, "E_TOO_LONG"),
        ({"inputs": [[70_000]]}, "E_TOKEN_ID"),
        ({"inputs": "x", "model": "nobody-knows-it"}, "E_MODEL"),
    ],
)
def test_what_cannot_be_embedded_is_refused(
    daemon: RunningDaemon, asked: dict[str, Any], code: str
) -> None:
    with daemon.connect() as client:
        with pytest.raises(pagedd.PageddError) as refused:
            client.embed(**asked)
        assert refused.value.code == code
        assert len(client.embed("x").vectors) == 1


def begun(daemon: RunningDaemon) -> None:
    """Until somebody waits for something."""
    with daemon.control() as control:
        while not any(app["waiting"] for app in control.status()["apps"]):
            time.sleep(0.01)


def test_nobody_waits_for_vectors_that_were_cancelled() -> None:
    """8,000 tokens of 2 ms would take 16 s."""

    async def main(slow: RunningDaemon) -> None:
        async with pagedd.aconnect("leaves", host=slow.host, timeout=60) as client:
            asking = asyncio.create_task(client.embed(["x" * 8000]))
            await asyncio.to_thread(begun, slow)
            asking.cancel()
            await asyncio.wait([asking])
            assert asking.cancelled()
            started = time.monotonic()
            await client.embed("y")
            assert time.monotonic() - started < 8
            apps = (await client.status())["apps"]
            assert [app["waiting"] for app in apps if app["app"] == "leaves"] == [0]

    with running_daemon(model="simulated", simulated_token_us=2000) as slow:
        asyncio.run(asyncio.wait_for(main(slow), 60))


def test_an_engine_that_dies_is_followed_by_one_that_embeds() -> None:
    with running_daemon(model="simulated", simulated_token_us=500) as daemon:
        with daemon.connect() as client:
            wanted = client.embed("x" * 2000).vectors

        async def main() -> None:
            async with pagedd.aconnect("survives", host=daemon.host, timeout=60) as client:
                asking = asyncio.create_task(client.embed("x" * 2000))
                await asyncio.to_thread(begun, daemon)
                for process in daemon.family():
                    if "pagedd_daemon.engine" in process.cmdline():
                        psutil.Process(process.pid).kill()
                assert (await asking).vectors == wanted
                assert (await client.ping())["engine_deaths"] == 1

        asyncio.run(asyncio.wait_for(main(), 60))


def engine_of(backend: SimulatedBackend) -> Engine:
    return Engine(backend, time.monotonic)


def test_a_backend_without_vectors_says_so() -> None:
    backend = simulated()
    backend.embedder = None
    engine = engine_of(backend)
    reports: list[m.StepReport] = []
    engine.handle(m.Embed(-1, "app", 1, [bytes(4)], True))
    engine.step(reports.append)
    (told,) = [one for report in reports for one in report.embedded]
    assert (told.rid, told.code, told.details) == (-1, "E_NO_EMBEDDING", {"backend": "simulated"})
    assert not engine.has_work


def test_tokens_are_charged_like_those_of_prompts_and_others_go_on_between() -> None:
    engine = engine_of(simulated())
    reports: list[m.StepReport] = []
    engine.handle(m.Embed(-1, "one", 1, [bytes(400), bytes(40)], True))
    engine.handle(m.Embed(-2, "two", 1, [bytes(40)], True))
    while engine.has_work:
        engine.step(reports.append)
    over = [one.rid for report in reports for one in report.embedded]
    assert over == [-2, -1], "the other app's text comes before the second of the first"
    assert engine._scheduler.turns.fair.charged == 100 + 10 + 10


@pytest.mark.parametrize(
    ("klass", "most"),
    [(PriorityClass.INTERACTIVE, 0.6), (PriorityClass.BACKGROUND, 0.15)],
)
def test_beside_a_person_vectors_take_half_of_the_time_or_a_tenth(
    klass: PriorityClass, most: float
) -> None:
    now = 0.0

    def wait(moment: float) -> None:
        nonlocal now
        now = max(now, moment)

    backend = SimulatedBackend(
        replace(simulated().capabilities, asynchronous=False),
        step_s=0.010,
        token_s=0.001,
        clock=lambda: now,
        wait=wait,
    )
    engine = Engine(backend, lambda: now)
    reports: list[m.StepReport] = []
    stop = asdict(StopParams(max_tokens=300, ignore_eos=True))
    sampling = asdict(SamplingParams(temperature=0.0))
    person = int(PriorityClass.INTERACTIVE)
    engine.handle(m.Submit(1, "person", person, bytes(32), bytes(40), 1, sampling, stop))
    engine.handle(m.Embed(-1, "other", int(klass), [bytes(4 * 1000)] * 50, True))
    while not any(report.closed for report in reports):
        engine.step(reports.append)
    embedding = 1 - 300 * 0.011 / now
    assert 0.02 < embedding < most
    assert not any(report.embedded for report in reports)


# -------------------------------------------------------------------------------------- over HTTP


def test_openai_and_ollama_get_the_same_vectors(daemon: RunningDaemon) -> None:
    texts = [f"text {number}" for number in range(70)]  # more than one request of the daemon's

    async def use(client: httpx.AsyncClient) -> None:
        asked = {"model": "simulated", "input": texts}
        made = (await client.post("/v1/embeddings", json=asked)).json()
        vectors = [row["embedding"] for row in made["data"]]
        assert [row["index"] for row in made["data"]] == list(range(70))
        assert made["usage"]["total_tokens"] == made["usage"]["prompt_tokens"] > 70
        packed = await client.post("/v1/embeddings", json={**asked, "encoding_format": "base64"})
        raw = base64.b64decode(packed.json()["data"][3]["embedding"])
        assert list(struct.unpack("<64f", raw)) == vectors[3]
        theirs = (await client.post("/api/embed", json=asked)).json()
        assert theirs["embeddings"] == vectors
        assert theirs["prompt_eval_count"] == made["usage"]["prompt_tokens"]
        old = {"model": "simulated", "prompt": texts[0]}
        free = (await client.post("/api/embeddings", json=old)).json()["embedding"]
        assert np.allclose(np.array(free) / np.linalg.norm(free), vectors[0], atol=1e-6)
        for path, body, status in (
            ("/v1/embeddings", {"input": []}, 400),
            ("/v1/embeddings", {"input": ""}, 400),
            ("/v1/embeddings", {"input": "x", "dimensions": 3}, 400),
            ("/v1/embeddings", {"input": "x", "model": "nobody-knows-it"}, 404),
            ("/api/embed", {"input": "x"}, 400),
            ("/api/embed", {"input": "x" * 9000, "model": "simulated"}, 400),
        ):
            refused = await client.post(path, json=body)
            assert (refused.status_code, "error" in refused.json()) == (status, True), path

    with_gateway(daemon.host, use)
