"""``pagedd service``, the unit files, and the sockets as systemd passes them."""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

import pagedd
from pagedd.cli import _units
from tests.support.cli import run
from tests.support.daemon import environment

FAKE = """#!/bin/sh
echo "systemctl $*" >> "$CALLS"
case "$2" in
  show)
    state=inactive
    test "$3" = pagedd.socket && state=${FAKE_SOCKET:-inactive}
    printf 'ActiveState=%s\\nSubState=dead\\n' $state ;;
  show-environment)
    test -z "$FAKE_FAILS" || { echo 'Failed to connect to bus: No medium found' >&2; exit 1; } ;;
esac
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's home, with a service manager that only writes down what it is asked."""
    fake = tmp_path / "bin" / "systemctl"
    fake.parent.mkdir()
    fake.write_text(FAKE)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("PAGEDD_HOST", f"unix://{tmp_path}/none.sock")
    return tmp_path


def calls(home: Path) -> list[str]:
    path = home / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_install_writes_both_units_and_starts_to_listen(home: Path) -> None:
    done = run("service", "install")
    assert (done.status, "starts on the first request" in done.out) == (0, True), done.err
    units = home / "config" / "systemd" / "user"
    assert sorted(p.name for p in units.iterdir()) == ["pagedd.service", "pagedd.socket"]
    assert f"ExecStart={sys.executable} -m pagedd serve\n" in (units / "pagedd.service").read_text()
    assert calls(home) == [
        "systemctl --user show-environment",
        "systemctl --user daemon-reload",
        "systemctl --user disable pagedd.service",
        "systemctl --user enable pagedd.socket",
        "systemctl --user restart pagedd.socket",
    ]
    assert run("service", "install").status == 0, "again, after an upgrade"


def test_install_at_login_enables_the_service_too(home: Path) -> None:
    assert run("service", "install", "--at-login").status == 0
    assert calls(home)[-2:] == [
        "systemctl --user enable pagedd.socket pagedd.service",
        "systemctl --user restart pagedd.socket pagedd.service",
    ]


def test_install_with_gateway_starts_it_too_and_keeps_it(home: Path) -> None:
    done = run("service", "install", "--with-gateway")
    assert (done.status, "127.0.0.1:11500" in done.out) == (0, True), done.err
    unit = home / "config" / "systemd" / "user" / "pagedd-gateway.service"
    assert f"ExecStart={sys.executable} -m pagedd gateway\n" in unit.read_text()
    enabled = "systemctl --user enable pagedd.socket pagedd-gateway.service"
    assert calls(home)[-2] == enabled
    unit.write_text(unit.read_text() + "# old\n")
    assert run("service", "install").status == 0, "after an upgrade"
    assert "# old" not in unit.read_text()
    assert "pagedd-gateway.service" in run("service", "status", "--json").document()["units"]
    assert run("service", "uninstall").status == 0
    assert not unit.exists()
    assert calls(home)[-3] == (
        "systemctl --user disable --now pagedd.socket pagedd.service pagedd-gateway.service"
    )


def test_uninstall_leaves_nothing_of_ours_and_may_be_repeated(home: Path) -> None:
    run("service", "install")
    config = home / "config" / "pagedd" / "config.toml"
    config.parent.mkdir()
    config.touch()
    assert "removed" in run("service", "uninstall").out
    assert list((home / "config" / "systemd" / "user").iterdir()) == []
    assert config.exists()
    assert run("service", "uninstall").out == "nothing is installed\n"


def test_units_of_somebody_else_are_not_replaced_unless_forced(home: Path) -> None:
    path = home / "config" / "systemd" / "user" / "pagedd.service"
    path.parent.mkdir(parents=True)
    path.write_text("[Service]\nExecStart=/bin/mine\n")
    failed = run("service", "install")
    assert (failed.status, str(path) in failed.err, "--force" in failed.err) == (73, True, True)
    assert "mine" in path.read_text()
    assert calls(home) == ["systemctl --user show-environment"]
    assert run("service", "install", "--force").status == 0


def test_dry_run_shows_and_does_nothing(home: Path) -> None:
    document = run("service", "install", "--dry-run", "--json").document()
    assert len(document["files"]) == 2
    assert document["commands"][0] == ["systemctl", "--user", "daemon-reload"]
    assert calls(home) == []
    assert not (home / "config").exists()


def test_status_never_wakes_a_daemon_that_sleeps(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = run("service", "status", "--json").document()
    assert (document["daemon"], document["files"]) == (None, [])
    assert document["units"]["pagedd.socket"]["ActiveState"] == "inactive"
    monkeypatch.setenv("FAKE_SOCKET", "active")
    with (
        tempfile.TemporaryDirectory(prefix="pagedd-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as manager,
    ):
        monkeypatch.setenv("PAGEDD_HOST", f"unix://{folder}/pagedd.sock")
        manager.bind(f"{folder}/control.sock")
        manager.listen()
        manager.setblocking(False)
        assert "not running" in run("service", "status").out
        with pytest.raises(BlockingIOError):
            manager.accept()  # nobody has knocked


def test_without_a_manager_or_its_bus_it_says_what_to_do(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "1")
    failed = run("service", "install")
    assert (failed.status, "No medium found" in failed.err, "Log in" in failed.err) == (
        69,
        True,
        True,
    )
    assert not (home / "config").exists(), "nothing was written"
    monkeypatch.setenv("PATH", str(home))
    failed = run("service", "install")
    assert (failed.status, "'pagedd serve'" in failed.err) == (69, True)
    failed = run("service", "logs")
    assert (failed.status, "journalctl" in failed.err) == (69, True)


def test_paths_are_quoted_as_unit_files_want_them() -> None:
    text = _units.rendered("pagedd.service", ("/home/a b/100%/pagedd",))
    assert 'ExecStart="/home/a b/100%%/pagedd" serve\n' in text


def test_the_launchd_agent_is_a_property_list(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _units.plan(True, tuple(_units.SERVICES), "darwin")
    labels = ("io.pagedd.daemon", "serve"), ("io.pagedd.gateway", "gateway")
    for file, (label, command) in zip(plan.files, labels, strict=True):
        document = plistlib.loads(file.text.encode())
        assert document["Label"] == label == file.path.stem
        assert document["ProgramArguments"] == [sys.executable, "-m", "pagedd", command]
        assert document["KeepAlive"] == {"SuccessfulExit": False}
        assert _units.MARK in file.text


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian and Ubuntu: apt install systemd)")
    return path


def _rendered(folder: Path) -> list[str]:
    """The units as files, templates with a user's name."""
    names = []
    for name in (*_units.NAMES, *_units.SYSTEM):
        file = folder / name.replace("@.", "@root.")
        file.write_text(_units.rendered(name, ("/bin/true",)))
        names.append(str(file))
    return names


def test_every_unit_passes_systemd_analyze_verify(tmp_path: Path) -> None:
    tool = _tool("systemd-analyze")
    files = _rendered(tmp_path)
    env = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    for options, chosen in (([], files), (["--user"], files[: len(_units.NAMES)])):
        done = subprocess.run(
            [tool, "verify", "--man=no", *options, *chosen],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_the_hardened_unit_is_as_exposed_as_the_documentation_says(tmp_path: Path) -> None:
    tool = _tool("systemd-analyze")
    (unit,) = [file for file in _rendered(tmp_path) if file.endswith("@root.service")]
    done = subprocess.run(
        [tool, "security", "--offline=true", "--no-pager", unit], capture_output=True, text=True
    )
    told = re.search(r"exposure level .*: ([\d.]+) ", done.stdout)  # what follows may have colons
    assert told is not None, done.stdout
    assert float(told[1]) <= 2.0, "by the scale of this version of systemd"
    page = Path(__file__).parents[1] / "docs" / "service.md"
    assert "exposure level 1.1" in page.read_text()


def test_systemd_starts_the_daemon_on_the_first_request_and_it_is_answered() -> None:
    tool = _tool("systemd-socket-activate")
    with tempfile.TemporaryDirectory(prefix="pagedd-") as name:
        folder = Path(name)
        socket_dir = folder / "run"
        socket_dir.mkdir(mode=0o700)
        sockets = [socket_dir / "pagedd.sock", socket_dir / "control.sock"]
        listen = [word for path in sockets for word in ("-l", str(path))]
        serve = [sys.executable, "-m", "pagedd", "serve", "--model", "simulated"]
        serve += ["--backend", "simulated", "--socket-dir", str(socket_dir)]
        env = environment(folder)
        passed = [f"-E{key}={value}" for key, value in env.items()]
        process = subprocess.Popen(
            [tool, *passed, *listen, *serve], env=env, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        try:
            listening = 0
            for line in process.stderr:  # it says so for each socket
                listening += "Listening on" in line
                if listening == 2:
                    break
            reader = threading.Thread(target=process.stderr.read)
            reader.start()
            host = f"unix://{sockets[0]}"
            with pagedd.connect("first", host=host, timeout=60) as client:
                assert client.complete("hello", max_tokens=2, ignore_eos=True).text
            process.terminate()
            assert process.wait(60) == 0
            reader.join()
        finally:
            process.kill()
            process.wait()
            process.stderr.close()
