"""The checks of ``make check`` catch what they promise to catch."""

from __future__ import annotations

from pathlib import Path

import pytest

import check_imports
import check_length

CLEAN = {
    "kvpager/kvpager/__init__.py": "import numpy as np\nfrom . import types\n",
    "kvpager/kvpager/types.py": "import numpy as np\n",
    "clients/python/pagedd/__init__.py": "import zmq\nfrom pagedd import _core\n",
    "clients/python/pagedd/_core.py": "import msgpack\n",
    "clients/python/pagedd/cli/__init__.py": "import click\n",
    "daemon/pagedd_daemon/__init__.py": "",
    "daemon/pagedd_daemon/link.py": "import msgpack\n",
    "daemon/pagedd_daemon/heavy.py": "import numpy\n",
    "daemon/pagedd_daemon/front/__init__.py": "from pagedd_daemon import link\nimport pagedd\n",
    "daemon/pagedd_daemon/engine/__init__.py": "import llama_cpp\nimport kvpager\n",
}


def breaches(root: Path, **changed: str) -> list[str]:
    """The breaches of a small clean tree in which the named files are replaced."""
    for path, text in {**CLEAN, **changed}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return check_imports.violations(root)


def test_a_clean_tree_has_no_breaches(tmp_path: Path) -> None:
    assert breaches(tmp_path) == []


def test_this_repository_has_no_breaches() -> None:
    assert check_imports.violations(check_imports.ROOT) == []


@pytest.mark.parametrize(
    ("path", "text", "says"),
    [
        ("kvpager/kvpager/pool.py", "import zmq\n", "kvpager may import numpy; not zmq"),
        ("kvpager/kvpager/pool.py", "import torch\n", "kvpager may import numpy; not torch"),
        (
            "kvpager/kvpager/pool.py",
            "from pagedd_daemon import link\n",
            "kvpager must not import pagedd_daemon",
        ),
        (
            "kernels/pagedd_kernels/attention.py",
            "import pagedd_daemon.link\n",
            "pagedd_kernels must not import pagedd_daemon",
        ),
        (
            "clients/python/pagedd/_core.py",
            "def later():\n    import pagedd_daemon\n",
            "pagedd must not import pagedd_daemon",
        ),
        ("clients/python/pagedd/_core.py", "import requests\n", "not requests"),
        (
            "clients/python/pagedd/_core.py",
            "import rich\n",
            "only the command line of pagedd may import rich",
        ),
    ],
)
def test_imports_point_one_way(tmp_path: Path, path: str, text: str, says: str) -> None:
    found = breaches(tmp_path, **{path: text})
    assert len(found) == 1
    assert found[0].startswith(path)
    assert says in found[0]


def test_the_front_stays_free_of_heavy_modules_however_they_are_reached(tmp_path: Path) -> None:
    found = breaches(
        tmp_path,
        **{
            "daemon/pagedd_daemon/link.py": "from .heavy import thing\n",
            "daemon/pagedd_daemon/front/__init__.py": "def f():\n    from ..link import x\n",
        },
    )
    assert [line for line in found if "numpy reaches pagedd_daemon.front" in line]
    assert "pagedd_daemon.heavy <- pagedd_daemon.link <- pagedd_daemon.front" in found[0]


@pytest.mark.parametrize("module", ["torch", "llama_cpp", "numpy"])
@pytest.mark.parametrize(
    "path", ["daemon/pagedd_daemon/front/server.py", "daemon/pagedd_daemon/__main__.py"]
)
def test_the_front_imports_no_model_runtime(tmp_path: Path, path: str, module: str) -> None:
    found = breaches(tmp_path, **{path: f"import {module}.sub as m\n"})
    assert any(f"{module} reaches" in line for line in found)


def test_an_import_for_type_checking_only_is_free(tmp_path: Path) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy\n"
    assert breaches(tmp_path, **{"daemon/pagedd_daemon/front/server.py": text}) == []


def test_the_other_branch_of_type_checking_does_run(tmp_path: Path) -> None:
    text = "import typing\nif typing.TYPE_CHECKING:\n    x = 1\nelse:\n    import numpy\n"
    assert breaches(tmp_path, **{"daemon/pagedd_daemon/front/server.py": text})


def test_long_files_are_named_longest_first(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/short.py").write_text("x = 1\n" * 450)
    (tmp_path / "tests/long.py").write_text("x = 1\n" * 451)
    (tmp_path / "tests/longer.py").write_text("x = 1\n" * 452)
    assert check_length.long_files(tmp_path) == [
        (452, Path("tests/longer.py")),
        (451, Path("tests/long.py")),
    ]
