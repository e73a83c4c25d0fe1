"""The client library against a real daemon on the simulated backend."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

import pagedd
from tests.support.daemon import RunningDaemon, running_daemon

LONG = 1_000_000
"""Tokens nobody waits for."""


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(model="simulated") as running:
        yield running


@pytest.fixture
def client(daemon: RunningDaemon) -> Iterator[pagedd.Client]:
    with daemon.connect("client-test") as connected:
        yield connected


def row_of(status: dict[str, list[dict[str, int | str]]], app: str) -> dict[str, int | str]:
    """An app's row of a status; an idle one where it has none."""
    return {str(row["app"]): row for row in status["apps"]}.get(app, {"running": 0, "waiting": 0})


def test_tokens_and_text_of_chunks_are_those_of_the_result(client: pagedd.Client) -> None:
    stream = client.generate("Once upon a time", max_tokens=40, ignore_eos=True, logprobs=1)
    chunks = list(stream)
    result = stream.result
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert tuple(t for chunk in chunks for t in chunk.tokens) == result.samples[0].tokens
    assert result.usage.generated_tokens == 40 == len(result.samples[0].logprobs or ())
    assert stream.prompt_tokens == result.usage.prompt_tokens
    assert client.detokenize(client.tokenize("Grüße", bos=False)) == "Grüße"


def test_pieces_are_the_bytes_of_a_text_token_by_token(client: pagedd.Client) -> None:
    tokens = client.tokenize("Grüße", bos=False)
    pieces = client.pieces(tokens)
    assert len(pieces) == len(tokens)
    assert b"".join(pieces).decode() == "Grüße"
    with pytest.raises(pagedd.InvalidRequest) as caught:
        client.pieces(tokens[:1] * 20_000)
    assert caught.value.details["limit"] == "list_entries"


def test_render_says_what_chat_would_read(client: pagedd.Client) -> None:
    messages = [{"role": "user", "content": "Good evening"}]
    rendered = client.render(messages)
    assert rendered.model == "simulated"
    assert "Good evening" in rendered.text
    with client.chat(messages, max_tokens=1) as stream:
        stream.wait()
        assert stream.prompt_tokens == len(rendered.tokens)


def test_the_seed_of_a_result_draws_it_again(client: pagedd.Client) -> None:
    first = client.complete("hello", max_tokens=20, ignore_eos=True)
    again = client.complete("hello", max_tokens=20, ignore_eos=True, seed=first.seed)
    assert again.samples == first.samples


def test_apps_at_the_same_time_get_what_each_would_get_alone(daemon: RunningDaemon) -> None:
    prompts = [f"app number {n} asks something" for n in range(6)]
    with daemon.connect("alone") as client:
        alone = [client.complete(p, max_tokens=60, temperature=0).samples for p in prompts]
    together: dict[int, tuple[pagedd.Sample, ...]] = {}

    def ask(number: int) -> None:
        with daemon.connect(f"app-{number}") as own:
            done = own.complete(prompts[number], max_tokens=60, temperature=0)
            together[number] = done.samples

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()

    async def ask_async() -> None:
        async with pagedd.aconnect("app-async", host=daemon.host) as own:
            done = await asyncio.gather(
                *(own.complete(prompts[n], max_tokens=60, temperature=0) for n in range(3, 6))
            )
            together.update((3 + n, one.samples) for n, one in enumerate(done))

    asyncio.run(ask_async())
    for thread in threads:
        thread.join()
    assert [together[n] for n in range(6)] == alone


def test_a_session_finds_its_kv_again_and_forks_apart(client: pagedd.Client) -> None:
    options: pagedd.GenerateOptions = {"max_tokens": 40, "ignore_eos": True, "temperature": 0}
    session = client.session(system="You are a helpful assistant who answers in detail.")
    session.say("Tell me a story.", **options).wait()
    branch = session.fork()
    second = session.say("And then?", **options).wait()
    assert second.usage.cached_tokens > second.usage.prompt_tokens // 2
    other = branch.say("And then?", **options).wait()
    assert other.samples == second.samples
    assert session.close().turns == 2
    branch.close()
    with pytest.raises(pagedd.UnknownSession):
        session.say("Still there?").wait()


def test_a_cancelled_turn_leaves_the_session_as_it_was(client: pagedd.Client) -> None:
    session = client.session()
    with session.say("Talk for ever.", max_tokens=LONG, ignore_eos=True) as stream:
        next(stream)
        stream.cancel()
        assert stream.wait().samples[0].reason == "cancelled"
    fresh = client.session()
    options: pagedd.GenerateOptions = {"max_tokens": 10, "temperature": 0}
    assert (
        session.say("Hello", **options).wait().samples
        == fresh.say("Hello", **options).wait().samples
    )


def test_a_busy_session_refuses_a_second_turn(client: pagedd.Client) -> None:
    session = client.session()
    with session.say("Talk for ever.", max_tokens=LONG, ignore_eos=True) as stream:
        next(stream)
        with pytest.raises(pagedd.Busy) as caught:
            session.say("Me too.").wait()
        assert caught.value.retryable


def test_errors_carry_their_figures_and_harm_nobody_else(client: pagedd.Client) -> None:
    with client.generate("x", max_tokens=LONG, ignore_eos=True) as bystander:
        next(bystander)
        with pytest.raises(pagedd.PromptTooLong) as too_long:
            client.complete([1] * 200_000)
        assert 200_000 in too_long.value.details.values()
        with pytest.raises(pagedd.InvalidRequest) as field:
            client.complete("x", temperature=float("nan"))
        assert field.value.details["field"] == "temperature"
        with pytest.raises(pagedd.ModelError):
            client.complete("x", model="no-such-model")
        with pytest.raises(pagedd.DeadlineExceeded):
            client.complete("x", max_tokens=LONG, ignore_eos=True, deadline_ms=20)
        next(bystander)


def test_dropping_a_stream_frees_its_place(daemon: RunningDaemon) -> None:
    with daemon.connect("dropper") as client:
        for _ in client.generate("x", max_tokens=LONG, ignore_eos=True):
            break
        settle(client, "dropper")


def test_a_client_that_is_killed_frees_its_place(daemon: RunningDaemon) -> None:
    code = (
        "import pagedd, sys\n"
        "stream = pagedd.connect('victim').generate('x', max_tokens=1000000, ignore_eos=True)\n"
        "next(stream); print('streams', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=daemon.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "streams\n"
        with daemon.connect("watcher") as client:
            assert row_of(client.status(), "victim")["running"] == 1
            victim.kill()
            settle(client, "victim")


def settle(client: pagedd.Client, app: str) -> None:
    """Until an app has nothing running; its end is no event that others could wait for."""
    deadline = time.monotonic() + 20
    while row_of(client.status(), app)["running"]:
        assert time.monotonic() < deadline, "its request goes on"


def test_sigterm_lets_streams_end_and_refuses_new_ones() -> None:
    with running_daemon(model="simulated", simulated_step_us=3000) as own:
        with own.connect() as client:
            stream = client.generate("x", max_tokens=200, ignore_eos=True)
            next(stream)
            own.process.terminate()
            assert stream.wait().usage.generated_tokens == 200
            with pytest.raises((pagedd.Draining, pagedd.ConnectionFailed)):
                client.complete("y")
        assert own.wait() == 0


def test_a_killed_daemon_is_an_error_at_once_and_its_processes_follow() -> None:
    with running_daemon(model="simulated") as own, own.connect() as client:
        family = own.family()
        stream = client.generate("x", max_tokens=LONG, ignore_eos=True)
        next(stream)
        own.kill()
        with pytest.raises(pagedd.SessionLost) as lost:
            stream.wait()
        assert (lost.value.code, lost.value.retryable) == ("E_SESSION_LOST", True)
        with pytest.raises(pagedd.ConnectionFailed):
            client.ping()
        assert own.wait() == -9
        with pytest.raises(pagedd.DaemonNotRunning):
            own.connect()
        assert psutil.wait_procs(family, timeout=10)[1] == []


def test_after_a_kill_the_stale_socket_is_taken_over() -> None:
    with running_daemon(model="simulated", load=False) as own:
        own.kill()
        own.wait()
        command = [sys.executable, "-m", "pagedd", "serve", "--model", "simulated"]
        command += ["--backend", "simulated", "--socket-dir", str(own.socket_dir)]
        with subprocess.Popen(command, env=own.env, stderr=subprocess.PIPE, text=True) as successor:
            assert successor.stderr is not None
            try:
                while " serves in " not in (line := successor.stderr.readline()):
                    assert line, "the second daemon did not start"
                with own.connect() as client:
                    assert client.ping()["pid"] == successor.pid
            finally:
                successor.terminate()
                successor.stderr.read()
        assert successor.returncode == 0
