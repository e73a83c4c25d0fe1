"""What can keep the daemon from running well on this machine, one check each.

A check says what it found and, where that is not well, what to do. None changes anything, loads a
model, or takes more than a few seconds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

import pagedd
from pagedd import _paths
from pagedd.cli import _output as out
from pagedd.cli._app import CommandError
from pagedd.cli._daemon import daemon_module
from pagedd.cli._machine import driver_version, gpus

State = Literal["ok", "warn", "fail"]

_TORCH_S = 60.0
_LOW_DISK_BYTES = 5 * 10**9
_LOW_MEMORY_BYTES = 2 * 10**9
_LEAST_FILES = 4096
"""Descriptors: each client takes five (`pagedd_daemon.front.transport`)."""
_LEAST_CAPABILITY = (8, 0)
"""bf16 in hardware."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found."""

    check: str
    state: State
    found: str
    advice: str = ""


def every() -> Iterator[Finding]:
    """All checks, in the order in which they are of use."""
    for check in _CHECKS:
        yield from _guarded(check)


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except (OSError, pagedd.PageddError) as error:
        yield Finding(check.__name__.strip("_"), "fail", str(error), "See the message.")


def _packages() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    missing = [n for n in ("pydantic", "jinja2", "tokenizers", "llama_cpp") if not _has(n)]
    if missing:
        said = f"Python {version}; without {', '.join(missing)} only a client"
        yield Finding("packages", "fail", said, "Install them: pip install 'pagedd[cpu]'")
        return
    yield Finding("packages", "ok", f"Python {version}, pagedd {pagedd.__version__}")


def _gpu() -> Iterator[Finding]:
    devices = [path for path in ("/dev/nvidia0", "/dev/dxg") if os.path.exists(path)]
    found = gpus()
    if not devices and not found:
        yield Finding("gpu", "ok", "no NVIDIA GPU: llama.cpp computes on the CPU")
        return
    closed = [path for path in devices if not os.access(path, os.R_OK | os.W_OK)]
    if closed:
        advice = f"Give yourself the right, usually by a group: see 'ls -l {closed[0]}'"
        yield Finding("gpu", "fail", f"{closed[0]} may not be opened by you", advice)
    if not found:
        advice = "Install the driver that fits the kernel's module, or reboot after an upgrade."
        yield Finding("gpu", "fail", "a GPU is there, and its driver does not answer", advice)
        return
    for gpu in found:
        said = f"{gpu.name}, {out.size(gpu.free_bytes)} of {out.size(gpu.total_bytes)} free"
        said += f", driver {driver_version()}"
        if gpu.capability < _LEAST_CAPABILITY:
            advice = "Use --backend llama.cpp; the paged engine computes in bf16."
            yield Finding("gpu", "warn", f"{said}; too old for bf16", advice)
        else:
            yield Finding("gpu", "ok", said)
    yield from _cuda()


def _cuda() -> Iterator[Finding]:
    """Where there is a GPU: can its engine run?"""
    missing = [name for name in ("torch", "triton", "safetensors", "cuda") if not _has(name)]
    if missing:
        advice = "Install them: pip install 'pagedd[cuda]'; llama.cpp computes until then."
        yield Finding("torch", "warn", f"without {', '.join(missing)} the GPU is not used", advice)
        return
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    try:
        done = subprocess.run(  # noqa: S603 - our own arguments
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_TORCH_S,
            check=False,
        )
        said = done.stdout.split()
    except subprocess.TimeoutExpired:
        said = []
    version, cuda, there = said if len(said) == 3 else ("?", "?", "False")
    triton = importlib.metadata.version("triton")
    what = f"torch {version} for CUDA {cuda}, Triton {triton}"
    if there != "True":
        advice = "Install a torch build for CUDA: see https://pytorch.org/get-started"
        yield Finding("torch", "fail", f"{what}: it finds no GPU", advice)
    else:
        yield Finding("torch", "ok", what)
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        advice = "Install one (Debian and Ubuntu: apt install gcc libc6-dev)."
        yield Finding("compiler", "fail", "no C compiler, which Triton starts kernels with", advice)
    else:
        yield Finding("compiler", "ok", compiler)


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    said = f"{out.size(memory.available)} of {out.size(memory.total)} available"
    limit = _group_limit()
    if limit is not None and limit < memory.total:
        said += f"; the control group allows {out.size(limit)}"
    if min(memory.available, limit or memory.available) < _LOW_MEMORY_BYTES:
        advice = "Close what takes memory, or set serve.ram_gb and serve.kv_tokens low."
        yield Finding("memory", "warn", said, advice)
    else:
        yield Finding("memory", "ok", said)


def _limits() -> Iterator[Finding]:
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = files == resource.RLIM_INFINITY
    if not unlimited and files < _LEAST_FILES:
        advice = "Raise the hard limit of open files (nofile in /etc/security/limits.conf)."
        yield Finding("limits", "warn", f"{files} open files: few clients can connect", advice)
    else:
        yield Finding("limits", "ok", f"{'any number of' if unlimited else files} open files")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if gpus() and locked != resource.RLIM_INFINITY and locked < 2**30:
        advice = "Run it as a service ('pagedd service install'), whose unit lifts the limit."
        said = f"{out.size(locked)} may be locked: page-locked memory for swapping may be refused"
        yield Finding("limits", "warn", said, advice)


def _folders() -> Iterator[Finding]:
    for name, folder in (("models", _paths.models_dir()), ("state", _paths.state_dir())):
        there = folder
        while not there.exists():
            there = there.parent
        if not os.access(there, os.W_OK | os.X_OK):
            advice = f"Make it yours: chown {os.getuid()} {there}"
            yield Finding("disk", "fail", f"{there} may not be written by you ({name})", advice)
            continue
        free = shutil.disk_usage(there).free
        said = f"{out.size(free)} free for {name} in {folder}"
        if free < _LOW_DISK_BYTES:
            advice = "Make room ('pagedd models rm NAME'), or move the folder to another disk."
            yield Finding("disk", "warn", said, advice)
        else:
            yield Finding("disk", "ok", said)
    rests = list(_paths.models_dir().glob(".pull-*.part"))
    if rests:
        size = sum(rest.stat().st_size for rest in rests)
        advice = f"Repeat the pull, or delete {_paths.models_dir()}/.pull-*"
        yield Finding("disk", "warn", f"{out.size(size)} of pulls that broke off", advice)


def _models() -> Iterator[Finding]:
    try:
        entries = daemon_module("models.registry").Registry().list()
    except CommandError:
        return
    good = [entry.name for entry in entries if entry.problem is None]
    for entry in entries:
        if entry.problem is not None:
            said = f"{entry.name}: {entry.problem}"
            yield Finding("models", "warn", said, "Delete it, or get it again.")
    if not good:
        advice = "Get the default one: pagedd pull"
        yield Finding("models", "warn", "there is none that can be used", advice)
    else:
        yield Finding("models", "ok", ", ".join(good))


def _settings() -> Iterator[Finding]:
    path = _paths.config_file()
    try:
        module, config = daemon_module("front.config_file"), daemon_module("front.config")
    except CommandError:
        return
    try:
        module.load(path)
    except config.ConfigError as error:
        for line in str(error).splitlines():
            yield Finding("settings", "fail", line, "Correct it; see 'pagedd config show'.")
        return
    yield Finding("settings", "ok", f"{path}" if path.exists() else "all by default")


def _isolation() -> Iterator[Finding]:
    """What the daemon checks of itself before it serves, and what its processes rely on."""
    try:
        module = daemon_module("front.isolation")
    except CommandError:
        return
    found = False
    for trouble, advice in module.troubles(_paths.config_file()):
        found = True
        yield Finding("isolation", "fail", trouble, advice)
    if not found:
        said = "who must be refused is refused; no core dumps; helpers are confined"
        yield Finding("isolation", "ok", said)


def _socket() -> Iterator[Finding]:
    data = _paths.resolve_host(None)
    folder = data.parent
    if len(os.fsencode(data)) > _paths.MAX_SOCKET_PATH_BYTES:
        advice = "Set XDG_RUNTIME_DIR to a shorter path."
        yield Finding("socket", "fail", f"{data} is too long for a socket", advice)
        return
    trouble = _socket_directory(folder) if folder.exists() else None
    if trouble is not None:
        yield Finding("socket", "fail", *trouble)
        return
    try:
        with pagedd.control(timeout=5.0) as control:
            answer = control.ping()
        said = f"the daemon answers: {answer['state']}"
        if folder.stat().st_uid != os.getuid():
            said = f"the daemon that uid {folder.stat().st_uid} shares answers: {answer['state']}"
        yield Finding("socket", "ok", said)
    except pagedd.DaemonNotRunning:
        advice = "Start it: pagedd serve; or have it started: pagedd service install"
        yield Finding("socket", "warn", f"nobody listens at {data}", advice)
    except pagedd.PageddError as error:
        advice = "See what it does: pagedd service logs"
        yield Finding("socket", "fail", f"the daemon does not answer: {error}", advice)


def _socket_directory(folder: Path) -> tuple[str, str] | None:
    """What is wrong with the owner or mode of the sockets' directory, and what to do."""
    found = folder.stat()
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.getuid():  # a daemon that somebody else shares
        if mode & 0o022:
            advice = "Do not use it: anybody could listen there. Tell whoever runs the daemon."
            return f"{folder} can be written by others than uid {found.st_uid}", advice
        return None
    if folder != _paths.SHARED_SOCKET_DIR:
        if mode & 0o077:
            return f"{folder} is not yours alone", f"Make it yours alone: chmod 700 {folder}"
        return None
    access = daemon_module("front.access").Access(True, None if mode & 0o001 else found.st_gid)
    wrong = daemon_module("front.listener").directory_trouble(mode, found.st_gid, access)
    return None if wrong is None else (f"{folder} {wrong[0]}", f"Run: {wrong[1]} {folder}")


def _group_limit() -> int | None:
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _packages,
    _gpu,
    _memory,
    _limits,
    _folders,
    _models,
    _settings,
    _isolation,
    _socket,
)
