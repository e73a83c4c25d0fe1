"""What is in the wheel and the sdist, and what the manual pages say."""

from __future__ import annotations

import email.message
import email.parser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import make_man

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "pagedd": "clients/python/pagedd",
    "pagedd_http": "clients/http/pagedd_http",
    "pagedd_daemon": "daemon/pagedd_daemon",
    "kvpager": "kvpager/kvpager",
    "pagedd_kernels": "kernels/pagedd_kernels",
}
NOT_BASE = (
    *("llama-cpp-python", "numpy", "pydantic", "torch", "triton", "huggingface-hub"),
    *("starlette", "uvicorn"),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return folder


def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.parser.Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_has_every_module_and_file_of_the_packages_and_nothing_else(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        f"{name}/{file.relative_to(ROOT / folder)}"
        for name, folder in PACKAGES.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert inside == expected
    for needed in ("pagedd/py.typed", "pagedd/cli/units/pagedd.service", "kvpager/py.typed"):
        assert needed in inside


def test_the_base_install_needs_neither_a_model_runtime_nor_a_compiler(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        described = metadata(wheel)
    assert described["License-Expression"] == "Apache-2.0"
    wanted = described.get_all("Requires-Dist") or []
    base = [line for line in wanted if "extra ==" not in line]
    assert not [line for line in base if line.lower().startswith(NOT_BASE)]
    assert {"cpu", "cuda", "http"} <= set(described.get_all("Provides-Extra") or [])


def test_the_sdist_has_what_it_takes_to_build_and_test(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ("pyproject.toml", "README.md", "LICENSE", "Makefile", "tests/conftest.py")
    assert not [name for name in needed if name not in names]
    assert path.stat().st_size < 5e6


def test_every_command_has_a_manual_page_that_man_can_read(tmp_path: Path) -> None:
    pages = dict(make_man.pages())
    assert {"pagedd.1", "pagedd-serve.1", "pagedd-service.1", "pagedd-pull.1"} <= set(pages)
    assert "PAGEDD CONFIG SET" in pages["pagedd-config.1"].replace("\\", "")
    man = shutil.which("man")
    if man is None:
        pytest.skip("man is not installed (Debian and Ubuntu: apt install man-db)")
    for name in ("pagedd.1", "pagedd-config.1"):
        file = tmp_path / name
        file.write_text(pages[name])
        done = subprocess.run(
            [man, "--warnings", "-E", "UTF-8", "-l", "-Tutf8", str(file)],
            env={"MANWIDTH": "80", "LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "Full documentation" in done.stdout
