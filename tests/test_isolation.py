"""What is kept from others: prompts from files and logs, memory from cores; and changed models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

import pagedd
from pagedd_daemon.backends import load_backend
from pagedd_daemon.backends.base import ModelLoadError
from pagedd_daemon.front import isolation
from pagedd_daemon.front.auth import Authenticator
from pagedd_daemon.messages import Configure
from pagedd_daemon.models.model import read_model_header
from pagedd_daemon.privacy import DEBUGGABLE
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.tiny_model import write_tiny_model
from tests.support.transport import Client

CANARY = "canary7f3a9b"


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(log_level="debug", environ={DEBUGGABLE: ""}) as running:
        yield running


def limits_of(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:25].strip(): line[25:].split() for line in lines}


def test_no_process_of_the_daemon_leaves_a_core_file(daemon: RunningDaemon) -> None:
    family = daemon.family()
    modules = {arg for p in family for arg in p.cmdline() if arg.startswith("pagedd_daemon.")}
    assert modules == {"pagedd_daemon.engine", "pagedd_daemon.helper"}
    for pid in (daemon.process.pid, *(process.pid for process in family)):
        assert limits_of(pid)["Max core file size"][:2] == ["0", "0"]
        if os.geteuid():  # whose files in /proc are root's: the kernel's sign of it
            assert Path(f"/proc/{pid}/environ").stat().st_uid == 0


def test_a_private_process_cannot_be_dumped() -> None:
    code = (
        "import ctypes, resource; from pagedd_daemon.privacy import keep_private; keep_private();"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), *resource.getrlimit(resource.RLIMIT_CORE))"
    )
    for setting, dumpable in (("", "0"), ("1", "1")):
        env = {**os.environ, DEBUGGABLE: setting}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [dumpable, "0", "0"]


def _use_every_text_field(daemon: RunningDaemon) -> str:
    """Text in every place where a client may put some; what was answered to one of them."""
    with daemon.connect("app") as client:
        said = client.generate(f"{CANARY} one", max_tokens=40, ignore_eos=True).wait().text
        client.generate(list(CANARY.encode()), max_tokens=4).wait()
        client.generate("x", stop=[CANARY], max_tokens=4).wait()
        client.generate("x", regex=f"{CANARY}[0-9]", max_tokens=40).wait()
        client.tokenize(f"{CANARY} two")
        client.chat([{"role": "user", "content": CANARY}], max_tokens=4).wait()
        session = client.session(system=f"You are {CANARY}.")
        session.say(f"{CANARY} three", max_tokens=4).wait()
        for wrong in ({"regex": f"({CANARY}"}, {"grammar": CANARY}, {"json_schema": CANARY}):
            with pytest.raises(pagedd.PageddError):
                client.generate("x", max_tokens=4, **wrong).wait()  # type: ignore[arg-type]
        stream = client.generate(f"{CANARY} four", max_tokens=3000, ignore_eos=True)
        next(stream)
        (engine,) = [p for p in daemon.family() if "pagedd_daemon.engine" in p.cmdline()]
        engine.send_signal(signal.SIGABRT)  # which leaves a core file where it may
        while not client.ping()["engine_deaths"]:
            pass  # asking takes as long as dying
        stream.cancel()
        return said


def _send_nonsense(daemon: RunningDaemon) -> list[str]:
    """Messages that are refused by what is wrong with a text in them; what was said of them."""
    complaints = []
    with Client(daemon.socket_dir) as raw:
        raw.hello("raw")
        for fields in (
            {"prompt": [CANARY]},
            {"prompt": {CANARY: 1}},
            {"prompt": CANARY, "stop": [CANARY * 100]},
            {"prompt": CANARY, "temperature": CANARY},
            {"prompt": CANARY, "tokens": CANARY},
        ):
            answer = raw.call("generate", **fields)
            assert answer["type"] == "error", fields
            complaints.append(repr(answer))
        raw.send(msgpack.packb({"v": 1, "verb": "generate", "id": "q", "prompt": CANARY})[:-3])
        complaints.append(repr(raw.event()))
        raw.send(b"\x81\xa6prompt\xac" + CANARY.encode()[:-1] + b"\xff")
        complaints.append(repr(raw.event()))
    return complaints


def test_no_text_of_a_prompt_gets_into_logs_files_figures_or_complaints(
    daemon: RunningDaemon,
) -> None:
    said = _use_every_text_field(daemon)
    written = {f"complaint {n}": text for n, text in enumerate(_send_nonsense(daemon))}
    for command in (("status",), ("ps",), ("stats",), ("metrics",), ("apps", "list")):
        for more in ((), ("--json",)) if command != ("metrics",) else ((),):
            done = daemon.command(*command, *more)
            assert done.returncode == 0, done.stderr
            written[f"pagedd {command} {more}"] = done.stdout + done.stderr
    for path in daemon.folder.rglob("*"):
        if path.is_file():
            written[str(path)] = path.read_bytes().decode("utf-8", "replace")
    written["log"] = daemon.log()
    assert "ended with signal 6" in written["log"], "an engine was to die on the way"
    ids = ", ".join(str(byte) for byte in CANARY.encode())
    assert len(said) > 20
    for secret in (CANARY, ids, said[:20]):
        assert [place for place, text in written.items() if secret in text] == []


def test_a_model_that_changed_after_it_was_checked_is_not_loaded(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    digest = read_model_header(path).digest
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for backend in ("llama.cpp", "torch", "auto"):
        with pytest.raises(ModelLoadError, match="has changed since it was checked") as refused:
            load_backend(Configure(backend, str(path), digest, 0, 64, 0, 1), lambda _: None)
        assert refused.value.details == {"path": str(path)}


# ------------------------------------------------------------------------------ pagedd doctor


def test_a_machine_that_isolates_has_no_troubles(tmp_path: Path) -> None:
    assert list(isolation.troubles(tmp_path / "none" / "config.toml")) == []


def test_a_peer_that_must_be_refused_and_is_not_is_a_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Authenticator, "allows", lambda self, peer: True)
    ((trouble, _),) = isolation.troubles(tmp_path / "none" / "config.toml")
    assert "a forbidden peer was let in" in trouble


def test_settings_that_others_can_write_are_a_trouble(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("")
    config.chmod(0o666)
    ((trouble, advice),) = isolation.troubles(config)
    assert "can be written by others" in trouble
    assert advice.endswith(f"chmod go-w {config}")
