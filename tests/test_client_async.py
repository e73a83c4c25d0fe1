"""The asyncio client against a scripted daemon over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

import pagedd
from pagedd._wire import Wire
from tests.support.fake_daemon import TOKEN, FakeDaemon, Peer, Request, ids, story


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as running:
        yield running


def with_client(daemon: FakeDaemon, use: Callable[[pagedd.AsyncClient], Awaitable[None]]) -> None:
    """Run a test with a connected client, and no longer than 20 s."""

    async def main() -> None:
        async with pagedd.aconnect("test", host=daemon.host, timeout=10) as client:
            await use(client)

    asyncio.run(asyncio.wait_for(main(), 20))


async def received(daemon: FakeDaemon, verb: str) -> Request:
    """`FakeDaemon.expect` without blocking the loop, which must go on to send."""
    return await asyncio.get_running_loop().run_in_executor(None, daemon.expect, verb)


def silent(peer: Peer, request: Request) -> None:
    """A handler that never answers."""


def test_a_stream_yields_chunks_and_ends_with_the_whole(daemon: FakeDaemon) -> None:
    async def use(client: pagedd.AsyncClient) -> None:
        stream = client.generate("hi")
        assert [chunk.text async for chunk in stream] == ["a", "b", "c"]
        assert stream.result.text == "abc"
        assert (stream.seed, stream.prompt_tokens) == (7, 3)
        assert (await client.complete([1, 2])).usage == pagedd.Usage(3, 1, 3)
        assert await client.generate("hi").text() == "abc"

    with_client(daemon, use)
    assert daemon.expect("bye")


def test_a_client_can_be_awaited(daemon: FakeDaemon) -> None:
    async def main() -> None:
        client = await pagedd.aconnect("test", host=daemon.host)
        assert client.server.version == "0.0"
        await client.close()
        await client.close()
        with pytest.raises(pagedd.ConnectionFailed, match="was closed"):
            client.generate("hi")

    asyncio.run(main())


def test_a_client_that_is_not_connected_says_so(daemon: FakeDaemon) -> None:
    with pytest.raises(pagedd.ConnectionFailed, match="async with"):
        pagedd.aconnect(host=daemon.host).generate("hi")


def test_many_streams_at_once_each_get_their_own(daemon: FakeDaemon) -> None:
    def echo(peer: Peer, request: Request) -> None:
        for event in story(request, *request["prompt"].split("|")):
            peer.events(event)

    daemon.on("generate", echo)

    async def use(client: pagedd.AsyncClient) -> None:
        prompts = ["|".join(f"{n}.{part}" for part in range(20)) for n in range(40)]
        done = await asyncio.gather(*(client.complete(prompt) for prompt in prompts))
        assert [one.text for one in done] == [prompt.replace("|", "") for prompt in prompts]

    with_client(daemon, use)


def test_lost_events_are_asked_for_again(daemon: FakeDaemon) -> None:
    def lossy(peer: Peer, request: Request) -> None:
        events = story(request, "a", "b", "c")
        peer.events(*(events[request["after"] + 1 :] if "after" in request else events[1:]))

    daemon.on("generate", lossy)

    async def use(client: pagedd.AsyncClient) -> None:
        assert (await client.complete("hi")).text == "abc"

    with_client(daemon, use)
    assert "after" not in daemon.expect("generate")
    assert daemon.expect("generate")["after"] == -1


def test_a_cancelled_task_cancels_its_request_and_spares_the_client(daemon: FakeDaemon) -> None:
    daemon.on("generate", lambda peer, request: peer.events(*story(request, "a", "b")[:2]))

    async def use(client: pagedd.AsyncClient) -> None:
        first_chunk = asyncio.Event()

        async def read() -> None:
            async with client.generate("hi") as stream:
                async for _ in stream:
                    first_chunk.set()

        task = asyncio.create_task(read())
        await first_chunk.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await received(daemon, "cancel"))["token"] == TOKEN
        waiting = asyncio.create_task(client.complete("hi"))
        await received(daemon, "generate")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await received(daemon, "cancel"))["target"] == "r4"
        assert (await client.ping())["pid"] == 1

    with_client(daemon, use)


def test_cancel_ends_a_stream_with_its_reason(daemon: FakeDaemon) -> None:
    started: list[tuple[Peer, Request]] = []
    daemon.on("generate", lambda peer, request: started.append((peer, request)))

    def cancel(peer: Peer, request: Request) -> None:
        data, generate = started[0]
        data.events(*story(generate, "x", reason="cancelled"))
        peer.result(request, cancelled=True)

    daemon.on("cancel", cancel)

    async def use(client: pagedd.AsyncClient) -> None:
        stream = client.generate("hi")
        await received(daemon, "generate")
        stream.cancel()
        assert (await stream.wait()).samples[0].reason == "cancelled"
        assert await client.cancel(stream.request_id)

    with_client(daemon, use)


def test_a_dropped_stream_is_cancelled(daemon: FakeDaemon) -> None:
    daemon.on("generate", lambda peer, request: peer.events(*story(request, "a", "b")[:2]))

    async def use(client: pagedd.AsyncClient) -> None:
        stream = client.generate("hi")
        await stream.__anext__()
        del stream
        gc.collect()
        assert (await received(daemon, "cancel"))["target"] == "r2"

    with_client(daemon, use)


def test_every_wait_has_a_deadline(daemon: FakeDaemon) -> None:
    for verb in ("generate", "tokenize", "status"):
        daemon.on(verb, silent)

    async def use(client: pagedd.AsyncClient) -> None:
        with pytest.raises(pagedd.RequestTimeout, match="no progress"):
            await client.complete("hi", timeout=0.02)
        with pytest.raises(pagedd.RequestTimeout, match="no answer"):
            await client.tokenize("hi", timeout=0.02)
        with pytest.raises(pagedd.RequestTimeout):
            await client.status(timeout=0.02)
        assert await received(daemon, "cancel")

    with_client(daemon, use)


def test_sessions_and_the_other_verbs(daemon: FakeDaemon) -> None:
    daemon.on("session.open", lambda peer, request: peer.result(request, session="s1"))
    daemon.on("session.fork", lambda peer, request: peer.result(request, session="s2"))
    daemon.on("session.close", lambda peer, request: peer.result(request, turns=1, rewrites=2))
    daemon.on("session.say", lambda peer, request: peer.events(*story(request, "hello")))
    daemon.on("chat", lambda peer, request: peer.events(*story(request, "ok")))
    daemon.on("tokenize", lambda peer, request: peer.result(request, tokens=ids(4, 5)))
    daemon.on("detokenize", lambda peer, request: peer.result(request, text="hi"))
    daemon.on("models", lambda peer, request: peer.result(request, models=[{"name": "m"}]))
    daemon.on("load", lambda peer, request: peer.result(request, model={"name": "m"}))
    daemon.on("unload", lambda peer, request: peer.result(request, unloaded=None))
    daemon.on("stats", lambda peer, request: peer.result(request, uptime_s=2))
    daemon.on("shutdown", lambda peer, request: peer.result(request))

    async def use(client: pagedd.AsyncClient) -> None:
        async with await client.session(system="Be terse.") as session:
            assert await session.say("hi").text() == "hello"
            assert await (await session.fork()).close() == pagedd.SessionSummary(1, 2)
        assert await client.chat([{"role": "user", "content": "hi"}]).text() == "ok"
        assert await client.tokenize("hi") == [4, 5]
        assert await client.detokenize([4, 5]) == "hi"
        assert await client.models() == [{"name": "m"}]
        assert await client.load() == {"name": "m"}
        assert await client.unload() is None
        assert await client.stats() == {"uptime_s": 2}
        await client.shutdown()

    with_client(daemon, use)


def test_no_daemon_and_refusal_are_errors_at_once(tmp_path: Path) -> None:
    async def connect(host: str) -> None:
        async with pagedd.aconnect(host=host):
            pass

    with pytest.raises(pagedd.DaemonNotRunning):
        asyncio.run(connect(f"unix://{tmp_path}/pagedd.sock"))
    with FakeDaemon(tmp_path, admit=False) as daemon, pytest.raises(pagedd.AccessDenied):
        asyncio.run(connect(daemon.host))


def test_a_daemon_that_dies_ends_every_stream(daemon: FakeDaemon) -> None:
    daemon.on("generate", lambda peer, request: peer.events(*story(request, "a", "b")[:2]))

    async def use(client: pagedd.AsyncClient) -> None:
        streams = [client.generate("hi") for _ in range(3)]
        for stream in streams:
            assert (await stream.__anext__()).text == "a"
        waiting = [asyncio.create_task(stream.wait()) for stream in streams]
        await asyncio.get_running_loop().run_in_executor(None, daemon.die)
        for done in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(done, pagedd.ConnectionFailed)
        with pytest.raises(pagedd.ConnectionFailed):
            client.generate("again")

    with_client(daemon, use)


def test_nonsense_from_the_daemon_is_a_protocol_violation(daemon: FakeDaemon) -> None:
    daemon.on("generate", lambda peer, request: peer.raw(b"\xc1nonsense"))

    async def use(client: pagedd.AsyncClient) -> None:
        with pytest.raises(pagedd.ProtocolViolation):
            await client.complete("hi")

    with_client(daemon, use)


def test_a_refused_connection_is_tried_again_while_the_queue_is_full(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libzmq cannot be told to fail, so its report is forged: the first connect looks refused."""
    check, refusals = Wire.check, iter([True])

    def refused_once(wire: Wire) -> pagedd.ConnectionFailed | None:
        if next(refusals, False):
            return wire._refused()
        return check(wire)

    monkeypatch.setattr(Wire, "check", refused_once)

    async def use(client: pagedd.AsyncClient) -> None:
        assert (await client.complete("hi")).text == "abc"

    with contextlib.suppress(StopIteration):
        with_client(daemon, use)
