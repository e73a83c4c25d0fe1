"""The synchronous client against a scripted daemon over real sockets."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import pagedd
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
