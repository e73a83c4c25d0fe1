"""``pagedd pull`` and ``pagedd models``: whole or not at all, however often it breaks off."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from pagedd.cli import _download
from pagedd.cli._app import CommandError
from pagedd.cli._hugging import choose
from tests.support.cli import run
from tests.support.daemon import environment
from tests.support.web import Web


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A GGUF file of some kilobytes."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_head_count(2)
    writer.add_tensor("token_embd.weight", np.arange(64 * 32, dtype=np.float32).reshape(64, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def web(model: bytes) -> Iterator[Web]:
    with Web() as served:
        served.files["/tiny.gguf"] = model
        yield served


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where models go; no daemon runs, and no attempt waits."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_download, "_PAUSES_S", (0.0, 0.0, 0.0))
    return Path(os.environ["XDG_CACHE_HOME"]) / "pagedd" / "models"


def left(models: Path) -> list[str]:
    return sorted(path.name for path in models.iterdir()) if models.exists() else []


def test_a_url_is_pulled_with_its_digest_and_licence(models: Path, web: Web, model: bytes) -> None:
    done = run("pull", f"{web.url}/tiny.gguf")
    assert done.status == 0, done.err
    assert hashlib.sha256(model).hexdigest() in done.out
    assert "licence: apache-2.0" in done.out
    assert (models / "tiny.gguf").read_bytes() == model
    assert left(models) == ["tiny.gguf"]
    again = run("pull", f"{web.url}/tiny.gguf", "--json").document()
    assert (again["pulled"], again["license"]) == (False, "licence: apache-2.0")


@pytest.mark.parametrize("at", [0, 1, 7, 32, 1000, -1])
def test_an_answer_that_breaks_off_anywhere_goes_on_where_it_stopped(
    models: Path, web: Web, model: bytes, at: int
) -> None:
    stop = at % len(model)
    web.break_after = lambda number: stop if number == 1 else None
    assert run("pull", f"{web.url}/tiny.gguf").status == 0
    assert (models / "tiny.gguf").read_bytes() == model
    assert [asked for _, asked in web.asked] == [None, f"bytes={stop}-" if stop else None]


def test_a_byte_at_a_time_gets_there(models: Path, web: Web, model: bytes) -> None:
    web.files["/tiny.gguf"] = model
    web.break_after = lambda number: 997
    assert run("pull", f"{web.url}/tiny.gguf").status == 0
    assert (models / "tiny.gguf").read_bytes() == model


def test_a_command_that_gave_up_is_continued_by_the_next(
    models: Path, web: Web, model: bytes
) -> None:
    web.break_after = lambda number: 500 if number == 1 else 0
    failed = run("pull", f"{web.url}/tiny.gguf")
    assert (failed.status, "500 B are here" in failed.err) == (75, True)
    assert not (models / "tiny.gguf").exists()
    web.break_after = lambda number: None
    assert run("pull", f"{web.url}/tiny.gguf").status == 0
    assert web.asked[-1][1] == "bytes=500-"
    assert (models / "tiny.gguf").read_bytes() == model
    assert left(models) == ["tiny.gguf"]


@pytest.mark.parametrize("way", ["changed", "no validator", "no ranges"])
def test_what_cannot_be_continued_is_begun_anew(
    models: Path, web: Web, model: bytes, way: str
) -> None:
    web.etag = None if way == "no validator" else '"one"'
    web.break_after = lambda number: 300 if number == 1 else 0
    assert run("pull", f"{web.url}/tiny.gguf").status == 75
    web.break_after = lambda number: None
    other = model[:-4] + b"\1\2\3\4"
    web.files["/tiny.gguf"] = other
    web.etag = None if way == "no validator" else '"two"'
    web.ranges = way != "no ranges"
    assert run("pull", f"{web.url}/tiny.gguf").status == 0
    assert (models / "tiny.gguf").read_bytes() == other


def test_a_file_that_is_not_the_named_one_is_not_kept(models: Path, web: Web) -> None:
    failed = run("pull", f"{web.url}/tiny.gguf", "--sha256", "0" * 64)
    assert (failed.status, "SHA-256" in failed.err) == (65, True)
    assert left(models) == []


def test_what_is_no_model_is_never_seen_by_the_daemon(models: Path, web: Web, model: bytes) -> None:
    web.files |= {"/page.gguf": b"<html>not here</html>", "/short.gguf": model[:-100]}
    for name in ("page", "short"):
        failed = run("pull", f"{web.url}/{name}.gguf")
        assert (failed.status, "no model which can be used" in failed.err) == (65, True)
    assert left(models) == []


def test_each_refusal_says_what_is_wrong_and_what_to_do(models: Path, web: Web) -> None:
    failed = run("pull", f"{web.url}/other.gguf")
    assert (failed.status, "Check the name" in failed.err) == (66, True)
    web.statuses = [403]
    failed = run("pull", f"{web.url}/tiny.gguf")
    assert (failed.status, "HF_TOKEN" in failed.err) == (77, True)
    web.statuses = [503] * 9
    failed = run("pull", f"{web.url}/tiny.gguf")
    assert (failed.status, "503" in failed.err) == (75, True)
    failed = run("pull", "http://127.0.0.1:1/tiny.gguf")
    assert (failed.status, "Check the network" in failed.err) == (75, True)
    failed = run("pull", f"{web.url}/page.html")
    assert failed.status == 64


def test_a_full_disk_is_noticed_before_anything_is_written(
    models: Path, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 100))
    failed = run("pull", f"{web.url}/tiny.gguf")
    assert (failed.status, "100 B are free" in failed.err) == (74, True)


def test_a_pull_that_is_killed_is_continued(models: Path, web: Web, model: bytes) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def hold(number: int) -> int | None:
        if number == 2:
            arrived.set()
            go_on.wait(30)
        return 700 if number == 1 else None

    web.break_after = hold
    process = subprocess.Popen(
        [sys.executable, "-m", "pagedd", "pull", f"{web.url}/tiny.gguf"],
        env=os.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert arrived.wait(30)
    busy = run("pull", f"{web.url}/tiny.gguf")
    assert (busy.status, "another pull" in busy.err) == (75, True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    go_on.set()
    assert not (models / "tiny.gguf").exists()
    assert run("pull", f"{web.url}/tiny.gguf").status == 0
    assert web.asked[-1][1] == "bytes=700-"
    assert (models / "tiny.gguf").read_bytes() == model


def test_secrets_stay_with_their_host(models: Path, web: Web, tmp_path: Path) -> None:
    remote = _download.Remote(f"{web.url}/tiny.gguf", headers={"Authorization": "Bearer x"})
    _download.fetch(remote, tmp_path / "a.gguf", lambda here, total: None)
    assert web.secrets == ["Bearer x"]


@pytest.fixture
def hub(web: Web, model: bytes) -> Web:
    """As much of Hugging Face as pull asks."""

    def sibling(name: str, data: bytes) -> dict[str, object]:
        web.files[f"/me/{repo}/resolve/abc/{name}"] = data
        lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}
        return {"rfilename": name, "size": len(data), "lfs": lfs}

    for repo, files in (
        ("one-GGUF", {"m-Q4_K_M.gguf": model, "m-Q8_0.gguf": model + b"", "README.md": b"x"}),
        ("none", {"pytorch_model.bin": b"x"}),
    ):
        web.documents[f"/api/models/me/{repo}"] = {
            "id": f"me/{repo}",
            "modelId": f"me/{repo}",
            "sha": "abc",
            "siblings": [sibling(name, data) for name, data in files.items()],
            "cardData": {"license": "mit"},
            "tags": [],
        }
    return web


def pull_from(hub: Web, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's library reads its environment once."""
    return subprocess.run(
        [sys.executable, "-m", "pagedd", "pull", *arguments],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_model_of_the_hub_is_checked_by_the_hubs_digest(
    models: Path, hub: Web, model: bytes
) -> None:
    done = pull_from(hub, "hf.co/me/one-GGUF:q8_0")
    assert done.returncode == 0, done.stderr
    assert "licence: mit (https://huggingface.co/me/one-GGUF)" in done.stdout
    assert (models / "m-Q8_0.gguf").read_bytes() == model
    hub.files["/me/one-GGUF/resolve/abc/m-Q4_K_M.gguf"] = model[:-1] + b"!"
    failed = pull_from(hub, "me/one-GGUF")
    assert (failed.returncode, "SHA-256" in failed.stderr) == (65, True)
    assert left(models) == ["m-Q8_0.gguf"]


def test_a_hub_without_the_model_or_out_of_reach_says_so(models: Path, hub: Web) -> None:
    failed = pull_from(hub, "me/none")
    assert (failed.returncode, "neither GGUF" in failed.stderr) == (66, True)
    failed = pull_from(hub, "me/unknown")
    assert failed.returncode in (66, 75)
    assert "HF_TOKEN" in failed.stderr or "Check the network" in failed.stderr


def test_the_quantisation_that_is_meant_is_chosen() -> None:
    files = ["a-Q4_K_M.gguf", "a-Q4_0.gguf", "a-Q8_0.gguf", "a-Q5_K-00001-of-00002.gguf"]
    assert choose(files, None, "r") == "a-Q4_K_M.gguf"
    assert choose(files, "q4_0", "r") == "a-Q4_0.gguf"
    assert choose(["only.gguf"], None, "r") == "only.gguf"
    with pytest.raises(CommandError, match="a-Q4_0"):
        choose(files, "Q6_K", "r")


def test_a_path_is_copied_whole_and_checked(models: Path, tmp_path: Path, model: bytes) -> None:
    source = tmp_path / "mine.gguf"
    source.write_bytes(model)
    assert run("pull", str(source)).status == 0
    assert (models / "mine.gguf").read_bytes() == model
    source.write_bytes(model[:100])
    assert run("pull", str(source)).status == 65
    assert (models / "mine.gguf").read_bytes() == model
    assert left(models) == ["mine.gguf"]


def test_models_are_listed_shown_and_removed_without_a_daemon(
    models: Path, tmp_path: Path, model: bytes
) -> None:
    models.mkdir(parents=True)
    (models / "mine.gguf").write_bytes(model)
    names = [row["name"] for row in run("models", "list", "--json").document()["models"]]
    assert "mine" in names
    shown = run("models", "show", "mine", "--json").document()
    assert (shown["license"], shown["layers"]) == ("apache-2.0", 1)
    failed = run("models", "rm", "smollm2", "--yes")
    assert (failed.status, "is not in" in failed.err) == (77, True)
    assert run("models", "rm", "mine", "--yes").status == 0
    assert left(models) == []
    failed = run("models", "rm", "mien")
    assert failed.status == 66
