"""Where things are: the XDG base directories, and never a place others could have prepared."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pagedd import _paths

_VARIABLES = ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME")


@pytest.fixture(autouse=True)
def nobody_set_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in (*_VARIABLES, "PAGEDD_HOST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_the_variables_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in _VARIABLES:
        monkeypatch.setenv(variable, f"/x/{variable}")
    assert _paths.data_socket() == Path("/x/XDG_RUNTIME_DIR/pagedd/pagedd.sock")
    assert _paths.control_socket() == Path("/x/XDG_RUNTIME_DIR/pagedd/control.sock")
    assert _paths.models_dir() == Path("/x/XDG_CACHE_HOME/pagedd/models")
    assert _paths.state_dir() == Path("/x/XDG_STATE_HOME/pagedd")
    assert _paths.config_file() == Path("/x/XDG_CONFIG_HOME/pagedd/config.toml")


def test_without_them_everything_is_at_home(tmp_path: Path) -> None:
    assert _paths.cache_dir() == tmp_path / ".cache/pagedd"
    assert _paths.state_dir() == tmp_path / ".local/state/pagedd"
    assert _paths.config_file() == tmp_path / ".config/pagedd/config.toml"


@pytest.mark.parametrize("value", ["", "relative/dir"])
def test_a_relative_variable_is_ignored_as_the_standard_says(
    value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert _paths.cache_dir() == tmp_path / ".cache/pagedd"


def test_without_a_runtime_directory_of_our_own_sockets_are_at_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 2**30)
    assert _paths.socket_dir() == tmp_path / ".cache/pagedd/run"


def test_a_socket_directory_can_be_given() -> None:
    assert _paths.data_socket(Path("/x")) == Path("/x/pagedd.sock")
    assert _paths.control_socket(Path("/x")) == Path("/x/control.sock")


def test_a_shared_daemon_is_found_where_the_user_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own, shared = tmp_path / "own/pagedd", tmp_path / "shared"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(own.parent))
    monkeypatch.setattr(_paths, "SHARED_SOCKET_DIR", shared)
    assert _paths.resolve_host(None) == own / "pagedd.sock"  # which an error then names
    for folder in (shared, own):
        folder.mkdir(parents=True)
        (folder / "pagedd.sock").touch()
        assert _paths.resolve_host(None) == folder / "pagedd.sock"
    monkeypatch.setenv("PAGEDD_HOST", "unix:///env/pagedd.sock")
    assert _paths.resolve_host(None) == Path("/env/pagedd.sock")


def test_the_host_is_a_unix_url_given_or_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PAGEDD_HOST", "unix:///env/pagedd.sock")
    assert _paths.resolve_host(None) == Path("/env/pagedd.sock")
    assert _paths.resolve_host("unix:///given.sock") == Path("/given.sock")
