"""The synchronous client against a scripted daemon over real sockets."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import pagedd
from pagedd._wire import Wire
from tests.support.fake_daemon import TOKEN, FakeDaemon, Peer, Request, ids, story


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as running:
        yield running


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[pagedd.Client]:
    with pagedd.connect("test", host=daemon.host, timeout=10) as connected:
        yield connected


def silent(peer: Peer, request: Request) -> None:
    """A handler that never answers."""


def test_hello_carries_app_and_priority_and_brings_the_servers_word(daemon: FakeDaemon) -> None:
    with pagedd.connect("my-editor", "interactive", host=daemon.host) as client:
        hello = daemon.expect("hello")
        assert (hello["v"], hello["app"], hello["priority"]) == (1, "my-editor", "interactive")
        assert hello["client"] == f"pagedd-python/{pagedd.__version__}"
        assert client.server.version == "0.0"
        assert client.server.limits == {"frame_bytes": 2**20}
    assert daemon.expect("bye")["verb"] == "bye"


def test_a_stream_yields_chunks_and_ends_with_the_whole(client: pagedd.Client) -> None:
    stream = client.generate("hi", max_tokens=3)
    assert [(chunk.text, chunk.tokens) for chunk in stream] == [
        ("a", (0,)),
        ("b", (1,)),
        ("c", (2,)),
    ]
    result = stream.result
    assert (result.text, result.model, result.seed) == ("abc", "fake", 7)
    assert result.samples == (pagedd.Sample(0, "abc", (0, 1, 2), "stop"),)
    assert result.usage == pagedd.Usage(3, 1, 3)
    assert result.timings.ttft_ms == 1.5
    assert list(stream) == []


def test_complete_and_text_read_to_the_end(client: pagedd.Client) -> None:
    assert client.complete("hi").text == "abc"
    assert client.generate("hi").text() == "abc"


def test_options_travel_as_the_protocol_names_them(
    daemon: FakeDaemon, client: pagedd.Client
) -> None:
    client.complete([1, 2], stop="\n", stop_token_ids=(5,), logit_bias={3: -1.5}, keep_alive="5m")
    request = daemon.expect("generate")
    del request["id"]
    assert request == {
        "v": 1,
        "verb": "generate",
        "tokens": ids(1, 2),
        "stop": ["\n"],
        "stop_token_ids": [5],
        "logit_bias": {3: -1.5},
        "keep_alive": "5m",
    }


def test_a_misspelt_option_is_a_type_error_with_the_nearest_name(client: pagedd.Client) -> None:
    with pytest.raises(TypeError, match="did you mean 'max_tokens'"):
        client.generate("hi", max_token=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("prompt", [[1, 2**31], [1, 1.5], ["a"]])
def test_token_ids_that_are_no_int32_are_refused_here(client: pagedd.Client, prompt: list) -> None:  # type: ignore[type-arg]
    with pytest.raises(pagedd.InvalidRequest) as caught:
        client.generate(prompt)
    assert caught.value.details == {"field": "tokens"}


def test_an_unencodable_prompt_is_refused_here(client: pagedd.Client) -> None:
    with pytest.raises(pagedd.InvalidRequest, match="cannot be sent"):
        client.generate("\ud800")


def test_a_request_longer_than_a_frame_is_refused_here_and_others_go_on(
    client: pagedd.Client,
) -> None:
    with pytest.raises(pagedd.InvalidRequest) as caught:
        client.generate("x" * 2**20)
    assert caught.value.code == "E_LIMIT"
    assert caught.value.details["value"] == 2**20
    assert client.complete("hi").text == "abc"


def test_text_held_back_comes_as_a_last_chunk(daemon: FakeDaemon, client: pagedd.Client) -> None:
    def held_back(peer: Peer, request: Request) -> None:
        events = story(request, "a")
        events[-1]["finish"] = [
            {"index": 1, "reason": "length", "text": "é"},
            {"index": 0, "reason": "stop", "text": ""},
        ]
        peer.events(*events)

    daemon.on("generate", held_back)
    stream = client.generate("hi", n=2)
    assert [(chunk.index, chunk.text) for chunk in stream] == [(0, "a"), (1, "é")]
    assert [sample.text for sample in stream.result.samples] == ["a", "é"]


def test_logprobs_come_with_their_tokens(daemon: FakeDaemon, client: pagedd.Client) -> None:
    def with_logprobs(peer: Peer, request: Request) -> None:
        events = story(request, "a")
        events[1]["logprobs"] = [[-0.5, [[0, -0.5], [4, -1.0]]]]
        peer.events(*events)

    daemon.on("generate", with_logprobs)
    (chunk,) = client.generate("hi", logprobs=2)
    assert chunk.logprobs == (pagedd.TokenLogprob(0, -0.5, ((0, -0.5), (4, -1.0))),)


def test_an_error_of_the_daemon_is_raised_with_its_figures(
    daemon: FakeDaemon, client: pagedd.Client
) -> None:
    details = {"prompt_tokens": 9000, "context_tokens": 8192}
    daemon.on("generate", lambda peer, request: peer.error(request, "E_TOO_LONG", details=details))
    stream = client.generate("hi")
    with pytest.raises(pagedd.PromptTooLong) as caught:
        list(stream)
    assert caught.value.details == details
    with pytest.raises(pagedd.PromptTooLong):
        _ = stream.result


def test_an_error_in_the_middle_comes_after_the_chunks_before_it(
    daemon: FakeDaemon, client: pagedd.Client
) -> None:
    def breaks(peer: Peer, request: Request) -> None:
        peer.events(*story(request, "a", "b")[:2])
        peer.error(request, "E_ENGINE", seq=2, retryable=True)

    daemon.on("generate", breaks)
    stream = client.generate("hi")
    assert next(stream).text == "a"
    with pytest.raises(pagedd.EngineFailed) as caught:
        next(stream)
    assert caught.value.retryable


def test_lost_events_are_asked_for_again_and_nothing_is_missing(
    daemon: FakeDaemon, client: pagedd.Client
) -> None:
    def lossy(peer: Peer, request: Request) -> None:
        events = story(request, "a", "b", "c", "d")
        after = request.get("after")
        if after is None:
            peer.events(events[0], events[1])
            peer.events(events[3])
            peer.events(events[4])
        else:
            peer.events(*events[after + 1 :])

    daemon.on("generate", lossy)
    assert client.complete("hi", seed=1).text == "abcd"
    first, second = daemon.expect("generate"), daemon.expect("generate")
    assert second == first | {"after": 1}


def test_a_lost_last_event_is_asked_for_before_the_deadline(
    daemon: FakeDaemon, client: pagedd.Client
) -> None:
    def forgets_the_end(peer: Peer, request: Request) -> None:
        events = story(request, "a")
        peer.events(*(events[:-1] if "after" not in request else events[request["after"] + 1 :]))

    daemon.on("generate", forgets_the_end)
    assert client.complete("hi", timeout=0.2).text == "a"


def test_a_stream_without_progress_times_out_and_is_cancelled(
    daemon: FakeDaemon, client: pagedd.Client
) -> None:
    daemon.on("generate", silent)
    stream = client.generate("hi", timeout=0.05)
    with pytest.raises(pagedd.RequestTimeout) as caught:
        next(stream)
    assert caught.value.details["request"] == stream.request_id
    cancel = daemon.expect("cancel")
    assert (cancel["target"], cancel["token"]) == (stream.request_id, TOKEN)


def test_every_call_has_a_deadline(daemon: FakeDaemon, client: pagedd.Client) -> None:
    for verb in ("tokenize", "models", "status"):
        daemon.on(verb, silent)
    with pytest.raises(pagedd.RequestTimeout):
        client.tokenize("hi", timeout=0.02)
    with pytest.raises(pagedd.RequestTimeout):
        client.models(timeout=0.02)
    with pytest.raises(pagedd.RequestTimeout):
        client.status(timeout=0.02)
    assert client.complete("hi").text == "abc"


def test_streams_may_be_read_in_any_order(daemon: FakeDaemon, client: pagedd.Client) -> None:
    streams = [client.generate(str(number)) for number in range(5)]
    assert [stream.text() for stream in reversed(streams)] == ["abc"] * 5


def test_threads_may_share_a_client(daemon: FakeDaemon, client: pagedd.Client) -> None:
    def echo(peer: Peer, request: Request) -> None:
        for event in story(request, *request["prompt"].split("|")):
            peer.events(event)

    daemon.on("generate", echo)
    wrong: list[str] = []

    def read(name: str) -> None:
        for turn in range(20):
            words = [f"{name}.{turn}.{part}" for part in range(10)]
            text = client.complete("|".join(words)).text
            if text != "".join(words):
                wrong.append(text)

    threads = [threading.Thread(target=read, args=(f"t{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_thread_may_send_while_another_waits(daemon: FakeDaemon, client: pagedd.Client) -> None:
    waiting = threading.Event()

    def released_by_cancel(peer: Peer, request: Request) -> None:
        waiting.set()
        daemon.on(
            "cancel",
            lambda _, cancel: peer.events(*story(request, "x", reason="cancelled")),
        )

    daemon.on("generate", released_by_cancel)
    stream = client.generate("hi")
    texts: list[str] = []
    reader = threading.Thread(target=lambda: texts.append(stream.text()))
    reader.start()
    assert waiting.wait(10)
    stream.cancel()
    reader.join()
    assert texts == ["x"]
    assert stream.result.samples[0].reason == "cancelled"


def test_cancel_by_request_id_tells_whether_it_was_running(
    daemon: FakeDaemon, client: pagedd.Client
) -> None:
    daemon.on("cancel", lambda peer, request: peer.result(request, cancelled=False))
    assert client.cancel("r99") is False


def test_leaving_a_stream_early_cancels_it(daemon: FakeDaemon, client: pagedd.Client) -> None:
    daemon.on("generate", lambda peer, request: peer.events(*story(request, "a", "b")[:2]))
    with client.generate("hi") as stream:
        assert next(stream).text == "a"
    assert daemon.expect("cancel")["target"] == stream.request_id
    with pytest.raises(pagedd.PageddError, match="closed before its end"):
        next(stream)


def test_a_dropped_stream_is_cancelled(daemon: FakeDaemon, client: pagedd.Client) -> None:
    daemon.on("generate", lambda peer, request: peer.events(*story(request, "a", "b")[:2]))
    for _ in client.generate("hi"):
        break
    gc.collect()
    assert daemon.expect("cancel")["token"] == TOKEN


def test_sessions_say_fork_and_close(daemon: FakeDaemon, client: pagedd.Client) -> None:
    names = iter(["s1", "s2"])
    daemon.on("session.open", lambda peer, request: peer.result(request, session=next(names)))
    daemon.on("session.fork", lambda peer, request: peer.result(request, session=next(names)))
    daemon.on("session.close", lambda peer, request: peer.result(request, turns=1, rewrites=0))
    daemon.on("session.say", lambda peer, request: peer.events(*story(request, "hello")))
    with client.session(system="Be terse.", template_args={"x": 1}) as session:
        opened = daemon.expect("session.open")
        assert (opened["system"], opened["template_args"]) == ("Be terse.", {"x": 1})
        assert "tools" not in opened
        assert session.say("hi", temperature=0).text() == "hello"
        said = daemon.expect("session.say")
        assert (said["session"], said["content"], said["role"]) == ("s1", "hi", "user")
        branch = session.fork()
        assert branch.id == "s2"
        assert branch.close() == pagedd.SessionSummary(turns=1, rewrites=0)


def test_chat_hands_tools_and_template_arguments_on(
    daemon: FakeDaemon, client: pagedd.Client
) -> None:
    daemon.on("chat", lambda peer, request: peer.events(*story(request, "ok")))
    messages = [{"role": "user", "content": "hi"}]
    assert (
        client.chat(messages, tools=[{"name": "f"}], template_args={"think": False}).text() == "ok"
    )
    request = daemon.expect("chat")
    assert request["messages"] == messages
    assert (request["tools"], request["template_args"]) == ([{"name": "f"}], {"think": False})


def test_the_other_verbs_return_what_the_daemon_says(
    daemon: FakeDaemon, client: pagedd.Client
) -> None:
    daemon.on("tokenize", lambda peer, request: peer.result(request, tokens=ids(4, 5)))
    daemon.on("detokenize", lambda peer, request: peer.result(request, text="hi"))
    daemon.on("models", lambda peer, request: peer.result(request, models=[{"name": "m"}]))
    daemon.on("load", lambda peer, request: peer.result(request, model={"name": "m"}))
    daemon.on("unload", lambda peer, request: peer.result(request, unloaded="m"))
    daemon.on("stats", lambda peer, request: peer.result(request, uptime_s=2))
    daemon.on("shutdown", lambda peer, request: peer.result(request))
    assert client.tokenize("hi", special=True) == [4, 5]
    assert client.detokenize([4, 5]) == "hi"
    assert client.models() == [{"name": "m"}]
    assert client.load("m", keep_alive=-1) == {"name": "m"}
    assert client.unload() == "m"
    assert client.stats() == {"uptime_s": 2}
    assert client.ping()["steps"] == 5
    client.shutdown(drain=False)
    assert daemon.expect("shutdown")["drain"] is False


def test_control_asks_without_saying_hello(daemon: FakeDaemon) -> None:
    with pagedd.control(host=daemon.host) as control:
        assert control.ping()["state"] == "ready"
        assert control.cancel_requests(app="editor", target="r1")
        request = daemon.expect("cancel")
        assert (request["app"], request["target"]) == ("editor", "r1")
        assert control.cancel_requests()
        assert daemon.expect("cancel")["all"] is True
    assert daemon.received.empty()


def test_no_socket_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(pagedd.DaemonNotRunning, match="pagedd serve"):
        pagedd.connect(host=f"unix://{tmp_path}/pagedd.sock")
    with (
        pytest.raises(pagedd.DaemonNotRunning),
        pagedd.control(host=f"unix://{tmp_path}/pagedd.sock") as control,
    ):
        control.ping()


def test_a_stale_socket_is_an_error_at_once(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "pagedd.sock"))
    with pytest.raises(pagedd.DaemonNotRunning):
        pagedd.connect(host=f"unix://{tmp_path}/pagedd.sock")


def test_a_file_that_is_no_socket_is_named(tmp_path: Path) -> None:
    (tmp_path / "pagedd.sock").touch()
    with pytest.raises(pagedd.ConnectionFailed, match="is not a socket"):
        pagedd.connect(host=f"unix://{tmp_path}/pagedd.sock")


def test_a_full_queue_of_connections_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retried = threading.Semaphore(0)
    retry = Wire.retry

    def count_and_retry(wire: Wire) -> None:
        retry(wire)
        retried.release()

    monkeypatch.setattr(Wire, "retry", count_and_retry)
    connected: list[pagedd.Client] = []
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "pagedd.sock"))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                one = stack.enter_context(socket.socket(socket.AF_UNIX))
                one.setblocking(False)
                one.connect(str(tmp_path / "pagedd.sock"))
        host = f"unix://{tmp_path}/pagedd.sock"
        thread = threading.Thread(target=lambda: connected.append(pagedd.connect(host=host)))
        thread.start()
        for _ in range(3):
            assert retried.acquire(timeout=10)
        stack.enter_context(FakeDaemon(tmp_path, listener=listener))
        thread.join(timeout=10)
        assert connected[0].server.pid == 1
        connected[0].close()


def test_a_refused_user_gets_access_denied(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path, admit=False) as daemon:
        with pytest.raises(pagedd.AccessDenied, match="uid"):
            pagedd.connect(host=daemon.host)
        with pagedd.control(host=daemon.host) as control, pytest.raises(pagedd.AccessDenied):
            control.status()


def test_a_daemon_that_dies_ends_streams_at_once_after_what_arrived(
    daemon: FakeDaemon, client: pagedd.Client
) -> None:
    asked: list[Request] = []

    def both_in_one_message(peer: Peer, request: Request) -> None:
        asked.append(request)
        if len(asked) == 2:
            peer.events(*(event for one in asked for event in story(one, "a", "b")[:2]))

    daemon.on("generate", both_in_one_message)
    first, second = client.generate("1"), client.generate("2")
    assert next(first).text == "a"
    daemon.die()
    with pytest.raises(pagedd.ConnectionFailed):
        next(first)
    assert next(second).text == "a"
    with pytest.raises(pagedd.ConnectionFailed):
        next(second)
    with pytest.raises(pagedd.ConnectionFailed):
        client.generate("3")


def test_a_daemon_that_dies_wakes_every_waiting_thread(
    daemon: FakeDaemon, client: pagedd.Client
) -> None:
    arrived = threading.Semaphore(0)
    daemon.on("generate", lambda peer, request: arrived.release())
    failures: list[str] = []

    def read(stream: pagedd.Stream) -> None:
        try:
            stream.text()
        except pagedd.ConnectionFailed as error:
            failures.append(error.code)

    threads = [threading.Thread(target=read, args=(client.generate("x"),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert arrived.acquire(timeout=10)
    daemon.die()
    for thread in threads:
        thread.join(timeout=10)
    assert failures == ["E_CONNECTION"] * 4


def test_closing_ends_the_calls_of_other_threads(daemon: FakeDaemon) -> None:
    arrived = threading.Event()
    daemon.on("generate", lambda peer, request: arrived.set())
    client = pagedd.connect(host=daemon.host)
    failures: list[pagedd.PageddError] = []

    def read() -> None:
        try:
            client.generate("x").text()
        except pagedd.PageddError as error:
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert arrived.wait(10)
    client.close()
    thread.join(timeout=10)
    assert "was closed" in str(failures[0])
    client.close()
    with pytest.raises(pagedd.ConnectionFailed, match="was closed"):
        client.generate("y")


def test_nonsense_from_the_daemon_is_a_protocol_violation(
    daemon: FakeDaemon, client: pagedd.Client
) -> None:
    daemon.on("generate", lambda peer, request: peer.raw(b"\xc1nonsense"))
    with pytest.raises(pagedd.ProtocolViolation):
        client.complete("hi")


def test_another_protocol_version_is_named(daemon: FakeDaemon) -> None:
    daemon.on("hello", lambda peer, request: peer.raw(b"\x82\xa1v\x02\xa2ev\x90"))
    with pytest.raises(pagedd.ProtocolViolation, match="speaks protocol 2"):
        pagedd.connect(host=daemon.host)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_must_connect_anew(client: pagedd.Client) -> None:
    stream = client.generate("hi")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        codes = []
        for use in (lambda: client.generate("x"), lambda: next(stream), client.ping, stream.close):
            try:
                use()
            except pagedd.PageddError as error:
                codes.append(error.code)
        client.close()
        os.write(writing, ",".join(codes).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        assert answer.read() == "E_FORKED,E_FORKED,E_FORKED"
    assert os.waitpid(child, 0)[1] == 0
    assert stream.text() == "abc"


@pytest.mark.parametrize("host", ["tcp://127.0.0.1:1", "localhost:80", "unix://relative", ""])
def test_a_host_that_is_no_unix_socket_is_refused(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(pagedd.ConnectionFailed, match="unix:///path") as caught:
        pagedd.connect(host=host)
    assert (caught.value.code, caught.value.retryable) == ("E_HOST", False)


def test_the_environment_names_the_socket(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEDD_HOST", daemon.host)
    with pagedd.connect() as client:
        assert client.ping()["pid"] == 1


def test_importing_the_client_imports_nothing_heavy() -> None:
    heavy = ["asyncio", "click", "numpy", "platformdirs", "psutil", "rich"]
    code = f"import pagedd, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
