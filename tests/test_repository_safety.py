"""The rules of safety in ``make check`` catch what they promise to catch."""

from __future__ import annotations

from pathlib import Path

import pytest

import check_safety

CLEAN = {
    "clients/python/pagedd/__init__.py": "",
    "clients/python/pagedd/_core.py": (
        "import msgpack\ndef decoded(frame):\n    return msgpack.unpackb(frame)\n"
    ),
    "daemon/pagedd_daemon/__init__.py": "",
    "daemon/pagedd_daemon/link.py": (
        "import msgpack\ndef values(body):\n    return msgpack.unpackb(body)\n"
    ),
    "daemon/pagedd_daemon/front/__init__.py": "",
    "daemon/pagedd_daemon/front/wire.py": (
        "import msgpack\ndef _unpacked(data):\n    return msgpack.unpackb(data)\n"
    ),
    "daemon/pagedd_daemon/helper/__init__.py": "",
    "daemon/pagedd_daemon/helper/templates.py": (
        "import jinja2\nclass T:\n    def render(self):\n        return self._template.render()\n"
    ),
}


def breaches(root: Path, path: str = "", text: str = "") -> list[str]:
    """The breaches of a small clean tree in which one file is replaced."""
    for name, content in {**CLEAN, **({path: text} if path else {})}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return check_safety.violations(root)


def test_a_clean_tree_has_no_breaches(tmp_path: Path) -> None:
    assert breaches(tmp_path) == []


def test_this_repository_has_no_breaches() -> None:
    assert check_safety.violations(check_safety.ROOT) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import pickle\n", "pickle is forbidden"),
        ("from marshal import loads\n", "marshal is forbidden"),
        ("def f():\n    import shelve\n", "shelve is forbidden"),
        ("import joblib\n", "joblib is forbidden"),
        ("import diskcache as d\n", "diskcache is forbidden"),
        ("import multiprocessing.connection\n", "multiprocessing is forbidden"),
        ("import importlib\nimportlib.import_module('pickle')\n", "pickle is forbidden"),
        ("import importlib\nimportlib.import_module(name)\n", "computed name"),
        ("from importlib import import_module as i\ni(f'{name}')\n", "computed name"),
        ("__import__('pickle')\n", "__import__"),
        ("eval('1')\n", "eval runs"),
        ("f = eval\n", "eval runs"),
        ("import builtins\nbuiltins.eval('1')\n", "eval runs"),
        ("exec('x = 1')\n", "exec runs"),
        ("map(exec, [])\n", "exec runs"),
        ("socket.recv_pyobj()\n", ".recv_pyobj() pickles"),
        ("self.a.b().send_pyobj(1)\n", ".send_pyobj() pickles"),
        ("pandas.read_pickle('f')\n", ".read_pickle() pickles"),
        ("from llama_cpp import LlamaDiskCache\nLlamaDiskCache()\n", "LlamaDiskCache pickles"),
        ("import torch\ntorch.load('f')\n", "torch.load() without weights_only=True"),
        ("import torch\ntorch.load('f', weights_only=False)\n", "torch.load() without"),
        ("import torch\ntorch.load('f', weights_only=safe)\n", "torch.load() without"),
        ("import torch as t\nt.load('f')\n", "torch.load() without"),
        ("from torch import load\nload('f')\n", "torch.load() without"),
        ("import torch\nread = torch.load\n", "torch.load() without"),
        ("import torch\ntorch.jit.load('f')\n", "torch.jit.load runs"),
        ("np.load('f', allow_pickle=True)\n", "allow_pickle"),
        ("np.load('f', allow_pickle=yes)\n", "allow_pickle"),
        ("f()(x, trust_remote_code=True)\n", "trust_remote_code"),
    ],
)
@pytest.mark.parametrize("path", ["daemon/pagedd_daemon/loader.py", "benchmarks/loader.py"])
def test_nothing_is_unpickled_or_evaluated(tmp_path: Path, path: str, text: str, says: str) -> None:
    found = breaches(tmp_path, path, text)
    assert len(found) == 1
    assert found[0].startswith(path)
    assert says in found[0]


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load('f', weights_only=True)\n",
        "import numpy as np\nnp.load('f')\nnp.load('f', allow_pickle=False)\n",
        "asyncio.create_subprocess_exec('x')\n",
        "model.eval()\n",
        "import importlib\nimportlib.import_module('pynvml')\n",
        "import importlib\nimportlib.import_module(f'pagedd_daemon.{name}')\n",
    ],
)
def test_what_is_safe_is_let_through(tmp_path: Path, text: str) -> None:
    assert breaches(tmp_path, "daemon/pagedd_daemon/loader.py", text) == []


@pytest.mark.parametrize(
    "text",
    [
        "import msgpack\nmsgpack.unpackb(b'')\n",
        "from msgpack import unpackb as u\ndef values(x):\n    return u(x)\n",
        "import msgpack\nclass A:\n    reader = msgpack.Unpacker()\n",
        "import msgpack\nread = msgpack.loads\n",
    ],
)
def test_a_second_place_that_decodes_is_found(tmp_path: Path, text: str) -> None:
    path = "daemon/pagedd_daemon/front/other.py"
    (found,) = breaches(tmp_path, path, text)
    assert found.startswith(path)
    assert "msgpack is decoded in" in found


def test_a_decoder_that_decodes_twice_or_is_gone_is_found(tmp_path: Path) -> None:
    path = "daemon/pagedd_daemon/link.py"
    twice = "import msgpack\ndef values(b):\n    return msgpack.unpackb(b) or msgpack.loads(b)\n"
    assert "in 2 places" in breaches(tmp_path, path, twice)[0]
    assert "in 0 places" in breaches(tmp_path, path, "")[0]


def test_a_second_place_that_renders_is_found(tmp_path: Path) -> None:
    path = "daemon/pagedd_daemon/front/other.py"
    (found,) = breaches(tmp_path, path, "from jinja2.sandbox import SandboxedEnvironment\n")
    assert "only pagedd_daemon.helper.templates may import jinja2" in found
    (tmp_path / path).unlink()
    path = "daemon/pagedd_daemon/helper/templates.py"
    assert "renders in 2 places" in breaches(tmp_path, path, CLEAN[path] * 2)[0]
