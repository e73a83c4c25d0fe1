"""Builds ``dist/pagedd_VERSION_ARCH.deb`` from the wheel, with Debian's own tools.

Everything Python lies in a prefix of its own, ``/usr/lib/pagedd``, with the libraries that the
daemon needs on the CPU: Debian has no llama-cpp-python, and the versions of the others are ours.
It runs on Debian's and Ubuntu's python3 of the minor version it was built with.

    python packaging/deb/build.py [WHEEL]      # needs dpkg-deb and strip; lintian checks it
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "packaging" / "dev")]

import make_man  # noqa: E402
from pagedd import __version__  # noqa: E402
from pagedd.cli import _units  # noqa: E402
from pagedd.cli._completion import script  # noqa: E402

PREFIX = "usr/lib/pagedd"
REVISION = f"{__version__}-1"
MAINTAINER = "The pagedd developers <pagedd@example.org>"
DATE = "Wed, 25 Nov 2026 00:00:00 +0000"
_SHARED = re.compile(r"\.so(\.\d+)*$")

_CONTROL = """\
Package: pagedd
Version: {version}
Section: utils
Priority: optional
Architecture: {arch}
Depends: python3 (>= {minor}), python3 (<< {next}), libc6, libstdc++6, libgomp1
Recommends: systemd
Installed-Size: {size}
Maintainer: {maintainer}
Homepage: https://github.com/pagedd/pagedd
Description: share one language model among the apps of a machine
 A background service that multiplexes local apps onto one language model
 through a paged KV pool: no app can kill another, KV is kept where it is
 cheapest, and the person in front of the machine comes first.
 .
 This package computes on the CPU, through llama.cpp.
"""

_POSTINST = """\
#!/bin/sh
set -e
# The user of pagedd-shared.service.
if [ "$1" = configure ] && command -v systemd-sysusers > /dev/null; then
    systemd-sysusers pagedd.conf
fi
"""

_COPYRIGHT = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: pagedd
Source: https://github.com/pagedd/pagedd

Files: *
Copyright: 2026 The pagedd developers
License: Apache-2.0
Comment: The Python packages in /usr/lib/pagedd have licences of their own, in
 their dist-info folders.

License: Apache-2.0
 On Debian systems, the complete text of the Apache License, Version 2.0,
 can be found in /usr/share/common-licenses/Apache-2.0.
"""

_LAUNCHER = """\
#!/usr/bin/python3 -I
# pagedd with the libraries of its own prefix, and none of the user's.
import os
import sys

sys.path.insert(0, "/usr/lib/pagedd")
sys.dont_write_bytecode = True
# For the processes that the daemon starts.
os.environ.update(PYTHONPATH="/usr/lib/pagedd", PYTHONNOUSERSITE="1", PYTHONDONTWRITEBYTECODE="1")

from pagedd.cli import main  # noqa: E402

main()
"""


def build(wheel: Path, dist: Path) -> Path:
    """Stage the files and build the package. Returns its path."""
    arch = _output("dpkg", "--print-architecture")
    target = dist / f"pagedd_{REVISION}_{arch}.deb"
    with tempfile.TemporaryDirectory(prefix="pagedd-deb-") as name:
        root = Path(name) / "root"
        _python(root, wheel)
        _documents(root)
        _service(root)
        _control(root, arch)
        _modes(root)
        command = ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(root), str(target)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


def _python(root: Path, wheel: Path) -> None:
    prefix = root / PREFIX
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    pip += ["--no-compile", "--target", str(prefix)]
    subprocess.run([*pip, f"{wheel}[cpu,http]"], check=True)
    for folder in ("bin", "include", "share", "lib"):
        shutil.rmtree(prefix / folder, ignore_errors=True)
    for folder in prefix.rglob("tests"):
        # numpy's and others' own tests: a quarter of the package.
        if folder.is_dir():
            shutil.rmtree(folder)
    for path in prefix.rglob("*"):
        # Not what auditwheel has edited: strip would leave it unloadable.
        edited = path.parent.name.endswith(".libs")
        if path.is_file() and not edited and _SHARED.search(path.name):
            subprocess.run(["strip", "--strip-unneeded", str(path)], check=False)
    launcher = root / "usr/bin/pagedd"
    launcher.parent.mkdir(parents=True)
    launcher.write_text(_LAUNCHER, encoding="utf-8")


def _documents(root: Path) -> None:
    doc = root / "usr/share/doc/pagedd"
    doc.mkdir(parents=True)
    (doc / "copyright").write_text(_COPYRIGHT, encoding="utf-8")
    entry = f"pagedd ({REVISION}) unstable; urgency=medium\n\n  * See the upstream changelog.\n"
    _gzip(doc / "changelog.Debian.gz", f"{entry}\n -- {MAINTAINER}  {DATE}\n")
    _gzip(doc / "changelog.gz", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    man = root / "usr/share/man/man1"
    man.mkdir(parents=True)
    for name, text in make_man.pages():
        _gzip(man / f"{name}.gz", text)
    for shell, path in (
        ("bash", "usr/share/bash-completion/completions/pagedd"),
        ("zsh", "usr/share/zsh/vendor-completions/_pagedd"),
        ("fish", "usr/share/fish/vendor_completions.d/pagedd.fish"),
    ):
        file = root / path
        file.parent.mkdir(parents=True)
        file.write_text(script(shell), encoding="utf-8")
    overrides = root / "usr/share/lintian/overrides/pagedd"
    overrides.parent.mkdir(parents=True)
    shutil.copyfile(HERE / "lintian-overrides", overrides)


def _service(root: Path) -> None:
    for folder, names in (
        ("usr/lib/systemd/user", _units.NAMES),
        ("lib/systemd/system", _units.SYSTEM),
    ):
        (root / folder).mkdir(parents=True)
        for name in names:
            text = _units.rendered(name, ("/usr/bin/pagedd",))
            (root / folder / name).write_text(text, encoding="utf-8")
    users = root / "usr/lib/sysusers.d/pagedd.conf"
    users.parent.mkdir(parents=True)
    users.write_text(_units.SYSUSERS, encoding="utf-8")


def _control(root: Path, arch: str) -> None:
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    control = root / "DEBIAN"
    control.mkdir()
    size = sum(path.stat().st_size for path in files) // 1024
    major, minor = sys.version_info[:2]
    text = _CONTROL.format(
        version=REVISION,
        arch=arch,
        minor=f"{major}.{minor}",
        next=f"{major}.{minor + 1}",
        size=size,
        maintainer=MAINTAINER,
    )
    (control / "control").write_text(text, encoding="utf-8")
    (control / "postinst").write_text(_POSTINST, encoding="utf-8")
    sums = [f"{_md5(path)}  {path.relative_to(root)}\n" for path in files]
    (control / "md5sums").write_text("".join(sums), encoding="utf-8")


def _modes(root: Path) -> None:
    """As Debian has them, whatever the umask was."""
    for path in root.rglob("*"):
        if path.is_symlink():
            continue
        runs = path.is_dir() or path.parent.name == "bin" or path.name == "postinst"
        os.chmod(path, 0o755 if runs else 0o644)
    os.chmod(root, 0o755)  # noqa: S103 - what a package is unpacked into


def _gzip(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Build from the wheel that is named, or the one in ``dist/``."""
    dist = ROOT / "dist"
    wheels = [Path(sys.argv[1])] if len(sys.argv) > 1 else sorted(dist.glob("pagedd-*.whl"))
    if not wheels:
        print("there is no wheel in dist/: make dist", file=sys.stderr)
        return 1
    package = build(wheels[-1].resolve(), dist)
    print(package)
    if shutil.which("lintian") is None:
        print("lintian is not installed, so nothing was checked (apt install lintian)")
        return 0
    return subprocess.run(["lintian", "--fail-on", "error", str(package)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
