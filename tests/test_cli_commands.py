"""Every command against a real daemon on the simulated backend, without a terminal."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.daemon import RunningDaemon, running_daemon


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(model="simulated") as running:
        yield running


def ask(daemon: RunningDaemon, *arguments: str, stdin: str = "") -> Any:
    """The one JSON document of a command that succeeds and says nothing else."""
    done = daemon.command(*arguments, "--json", stdin=stdin)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def say(daemon: RunningDaemon, *arguments: str, stdin: str = "") -> str:
    """What a command that succeeds prints for people."""
    done = daemon.command(*arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    return done.stdout


def test_status_tells_the_state_and_the_pool(daemon: RunningDaemon) -> None:
    status = ask(daemon, "status")
    assert status["state"] == "ready"
    assert set(status["kv"]["gpu"]) == {"blocks_total", "used", "cached", "free"}
    text = say(daemon, "status")
    assert "ready" in text
    assert "BLOCKS" in text
    assert "GPU" in text


def test_ps_has_a_line_for_the_model_and_one_for_each_app(daemon: RunningDaemon) -> None:
    with daemon.connect("my-editor", "interactive") as client:
        client.complete("hello", max_tokens=3)
        text = say(daemon, "ps")
        document = ask(daemon, "ps")
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["NAME", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"]
    assert lines[1][0] == "simulated"
    columns = ["APP", "CLASS", "RUN", "WAIT", "KV(gpu/ram/disk)", "HIT%", "TTFT", "TOK/S"]
    assert lines[3] == [*columns, "WEIGHT", "SHARE%"]
    assert ["my-editor", "interactive"] in [line[:2] for line in lines[4:]]
    assert "my-editor" in [app["app"] for app in document["apps"]]


def test_stats_counts(daemon: RunningDaemon) -> None:
    before = ask(daemon, "stats")["tokens"]["generated"]
    say(daemon, "run", "hello", "--max-tokens", "3", "--ignore-eos")
    assert ask(daemon, "stats")["tokens"]["generated"] == before + 3
    assert "tokens.generated" in say(daemon, "stats")


def test_models_lists_what_there_is(daemon: RunningDaemon) -> None:
    assert [m["loaded"] for m in ask(daemon, "models")["models"] if m["name"] == "simulated"] == [
        True
    ]
    assert say(daemon, "models").split()[:6] == [
        "NAME",
        "SIZE",
        "FAMILY",
        "QUANT",
        "CONTEXT",
        "STATE",
    ]


def test_run_prints_the_completion_and_nothing_else(daemon: RunningDaemon) -> None:
    options = ("--max-tokens", "8", "--ignore-eos", "--seed", "1")
    document = ask(daemon, "run", "hello", *options)
    assert document["usage"]["generated_tokens"] == 8
    assert document["samples"][0]["reason"] == "length"
    assert say(daemon, "run", "hello", *options).rstrip("\n") == document["text"].rstrip("\n")


def test_run_reads_the_prompt_from_standard_input(daemon: RunningDaemon) -> None:
    options = ("--max-tokens", "4", "--temperature", "0")
    assert (
        ask(daemon, "run", "-", *options, stdin="héllo")["text"]
        == (ask(daemon, "run", "héllo", *options)["text"])
    )


def test_run_takes_every_option_of_a_generation(daemon: RunningDaemon) -> None:
    options = [
        "--max-tokens=5",
        "--min-tokens=1",
        "--temperature=0.5",
        "--top-k=20",
        "--top-p=0.9",
        "--min-p=0.01",
        "--typical-p=0.99",
        "--repetition-penalty=1.1",
        "--presence-penalty=0.1",
        "--frequency-penalty=0.1",
        "--seed=3",
        "--logprobs=1",
        "--deadline-ms=60000",
        "--ignore-eos",
        "--keep-alive=5m",
        "--model=simulated",
        "--app=me",
        "--priority=background",
        "--samples=2",
        "--stop=zzzz",
        "--stop=yyyy",
    ]
    document = ask(daemon, "run", "hello", *options)
    assert [sample["index"] for sample in document["samples"]] == [0, 1]
    assert len(document["samples"][1]["logprobs"]) == 5
    assert document["seed"] == 3


def test_run_shows_several_samples_one_after_the_other(daemon: RunningDaemon) -> None:
    text = say(daemon, "run", "hello", "-n", "2", "--max-tokens", "3", "--ignore-eos")
    assert "--- 0 (length)" in text
    assert "--- 1 (length)" in text


def test_verbose_figures_go_to_standard_error(daemon: RunningDaemon) -> None:
    done = daemon.command("run", "hello", "--max-tokens", "3", "--verbose")
    assert "first token" in done.stderr
    assert "first token" not in done.stdout


def test_chat_answers_each_line_of_a_pipe(daemon: RunningDaemon) -> None:
    options = ("--max-tokens", "5", "--ignore-eos", "--system", "Be terse.")
    turns = ask(daemon, "chat", *options, stdin="one\n\ntwo\n")["turns"]
    assert [turn["user"] for turn in turns] == ["one", "two"]
    assert all(turn["usage"]["generated_tokens"] == 5 for turn in turns)
    assert turns[1]["usage"]["cached_tokens"] > 0
    assert say(daemon, "chat", *options, stdin="one\n")


def test_unload_and_load(daemon: RunningDaemon) -> None:
    assert ask(daemon, "unload") == {"unloaded": "simulated"}
    assert ask(daemon, "status")["state"] == "asleep"
    assert say(daemon, "unload") == "no model was loaded\n"
    assert ask(daemon, "load", "--keep-alive", "5m")["model"]["name"] == "simulated"
    assert "simulated" in say(daemon, "load", "simulated")


def test_cancel_ends_the_streams_of_an_app_and_leaves_others(daemon: RunningDaemon) -> None:
    with daemon.connect("victim") as victim, daemon.connect("other") as other:
        stream = victim.generate("hello", max_tokens=4000, ignore_eos=True)
        spared = other.generate("hello", max_tokens=4000, ignore_eos=True)
        next(stream)
        next(spared)
        assert ask(daemon, "cancel", "--app", "victim") == {"cancelled": True}
        assert stream.wait().samples[0].reason == "cancelled"
        assert not spared._call.over
        assert say(daemon, "cancel", "--app", "victim") == "there was nothing to cancel\n"
        assert ask(daemon, "cancel", spared.request_id, "--app", "other")["cancelled"]
        assert spared.wait().samples[0].reason == "cancelled"


def test_version_names_both_sides(daemon: RunningDaemon) -> None:
    document = ask(daemon, "version")
    assert document["version"] == document["daemon"]


def test_a_bad_request_says_what_is_wrong_and_exits_64(daemon: RunningDaemon) -> None:
    done = daemon.command("run", "hello", "--temperature", "-1")
    assert done.returncode == 64
    assert "temperature" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_prompt_that_does_not_fit_exits_65_with_the_figures(daemon: RunningDaemon) -> None:
    done = daemon.command("run", "-", "--json", stdin="x" * 100_000)
    assert done.returncode == 65
    error = json.loads(done.stdout)["error"]
    assert error["code"] in ("E_TOO_LONG", "E_NEVER_FITS")
    assert 100_000 in error["details"].values() or 100_001 in error["details"].values()


def test_an_unknown_model_exits_66(daemon: RunningDaemon) -> None:
    done = daemon.command("load", "no-such-model")
    assert done.returncode == 66
    assert "pagedd models" in done.stderr


@pytest.mark.parametrize("command", ["shutdown", "stop"])
def test_shutdown_ends_the_daemon_with_status_0(command: str) -> None:
    with running_daemon(model="simulated", load=False) as own:
        assert json.loads(own.command(command, "--json").stdout) == {"shutdown": True}
        assert own.wait() == 0
        assert own.command("status").returncode == 69


def test_ctrl_c_at_the_daemon_drains_and_exits_0() -> None:
    with running_daemon(model="simulated", load=False) as own:
        own.process.send_signal(signal.SIGINT)
        assert own.wait() == 0


def test_a_second_daemon_on_the_same_socket_exits_75_and_names_the_first(
    daemon: RunningDaemon,
) -> None:
    done = daemon.command(
        "serve", "--model", "simulated", "--backend", "simulated",
        "--socket-dir", str(daemon.socket_dir),
    )  # fmt: skip
    assert done.returncode == 75
    assert str(daemon.process.pid) in done.stderr
    assert ask(daemon, "status")["pid"] == daemon.process.pid


@pytest.mark.parametrize("command", [("run", "-"), ("chat",)])
def test_standard_input_that_is_not_utf8_is_refused(
    daemon: RunningDaemon, command: tuple[str, ...]
) -> None:
    done = daemon.command(*command, stdin=b"\xff\xfe\n")
    assert done.returncode == 64
    assert "not UTF-8" in done.stderr
