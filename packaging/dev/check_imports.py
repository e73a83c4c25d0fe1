"""Checks what may import what; part of ``make check``.

The rules are those of docs/architecture.md, "Who imports whom". Modules are read as syntax trees
and never imported. An import inside a function counts like any other; one under
``if TYPE_CHECKING:`` does not, since it never runs.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PACKAGES: Mapping[str, str] = {
    "pagedd": "clients/python/pagedd",
    "pagedd_http": "clients/http/pagedd_http",
    "pagedd_daemon": "daemon/pagedd_daemon",
    "kvpager": "kvpager/kvpager",
    "pagedd_kernels": "kernels/pagedd_kernels",
}
"""Import name and folder; those that do not exist are left out."""

STDLIB = frozenset(sys.stdlib_module_names)

MAY_IMPORT: Mapping[str, frozenset[str]] = {
    # The pager is sans-IO: numpy for its flat arrays and nothing else.
    "kvpager": frozenset({"numpy"}),
    "pagedd_kernels": frozenset({"torch", "triton", "numpy"}),
    # The client must be light enough to be anybody's dependency.
    "pagedd": frozenset(
        {"zmq", "msgpack", "click", "rich", "psutil", "platformdirs", "huggingface_hub"}
    ),
    # A client like any other, on a web framework.
    "pagedd_http": frozenset({"pagedd", "starlette", "uvicorn", "pydantic"}),
}
"""Beyond the standard library and itself. A package that is not named may import anything but
what the other rules forbid it."""

COMMAND_LINE_ONLY = frozenset({"click", "rich", "psutil", "platformdirs", "huggingface_hub"})
"""What `import pagedd` itself must not cost: only modules of the command line may import these."""

COMMAND_LINE = ("pagedd.cli", "pagedd.__main__")

LIGHT_ROOTS = ("pagedd", "pagedd_daemon.front", "pagedd_daemon.__main__")
"""These and all they import from our own packages must stay free of `HEAVY`: the front has a memory
promise (80 MB), and a client runs inside other people's programs."""

HEAVY = frozenset({"torch", "llama_cpp", "numpy", "triton", "tokenizers", "gguf"})

ONE_WAY: Mapping[str, frozenset[str]] = {
    "pagedd": frozenset({"pagedd_daemon", "kvpager", "pagedd_kernels"}),
    "pagedd_http": frozenset({"pagedd_daemon", "kvpager", "pagedd_kernels"}),
    "kvpager": frozenset({"pagedd", "pagedd_daemon", "pagedd_kernels"}),
    "pagedd_kernels": frozenset({"pagedd", "pagedd_daemon", "kvpager"}),
}
"""Imports point one way: clients <- daemon -> kvpager, kernels."""


@dataclass(frozen=True)
class Module:
    """One parsed file of a package."""

    name: str
    path: Path
    tree: ast.Module
    is_package: bool


@dataclass(frozen=True)
class Import:
    """A name that a module imports, and where."""

    target: str
    line: int


def load(root: Path) -> dict[str, Module]:
    """Every module of our packages under ``root``, by dotted name."""
    modules: dict[str, Module] = {}
    for package, folder in PACKAGES.items():
        base = root / folder
        for path in sorted(base.rglob("*.py")):
            parts = [package, *path.relative_to(base).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
            modules[name] = Module(name, path, tree, is_package)
    return modules


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below ``node`` that can run: all but those under ``if TYPE_CHECKING:``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            for statement in child.orelse:
                yield statement
                yield from _running(statement)
        else:
            yield child
            yield from _running(child)


def imports(module: Module) -> list[Import]:
    """What a module imports. ``from a import b`` gives ``a`` and ``a.b``: b may be a module."""
    found: list[Import] = []
    for node in _running(module.tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.name.split(".")
                keep = len(package) - node.level + (1 if module.is_package else 0)
                base = ".".join([*package[:keep], *([base] if base else [])])
            found.append(Import(base, node.lineno))
            found += [Import(f"{base}.{alias.name}", node.lineno) for alias in node.names]
    return found


def _top(name: str) -> str:
    return name.partition(".")[0]


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _where(module: Module, line: int, root: Path) -> str:
    return f"{module.path.relative_to(root)}:{line}"


def check_allowed(modules: Mapping[str, Module], root: Path) -> Iterator[str]:
    """`MAY_IMPORT`, `ONE_WAY` and `COMMAND_LINE_ONLY`."""
    for module in modules.values():
        package = _top(module.name)
        allowed = MAY_IMPORT.get(package)
        for target, line in {(_top(i.target), i.line) for i in imports(module)}:
            where = _where(module, line, root)
            if target in ONE_WAY.get(package, ()):
                yield f"{where}: {package} must not import {target}"
            elif allowed is not None and target not in STDLIB | allowed | {package}:
                yield f"{where}: {package} may import {', '.join(sorted(allowed))}; not {target}"
            elif (
                package == "pagedd"
                and target in COMMAND_LINE_ONLY
                and not module.name.startswith(COMMAND_LINE)
            ):
                yield f"{where}: only the command line of pagedd may import {target}"


def check_light(modules: Mapping[str, Module], root: Path) -> Iterator[str]:
    """`LIGHT_ROOTS`: follows imports through our own packages, parents' ``__init__`` included."""
    came_from: dict[str, str] = {}
    queue = [
        name
        for name in modules
        if any(name == light or name.startswith(light + ".") for light in LIGHT_ROOTS)
    ]
    came_from = dict.fromkeys(queue, "")
    while queue:
        module = modules[queue.pop()]
        for target in imports(module):
            if _top(target.target) in HEAVY:
                chain, at = [module.name], came_from[module.name]
                while at:
                    chain.append(at)
                    at = came_from[at]
                yield (
                    f"{_where(module, target.line, root)}: {_top(target.target)} reaches "
                    f"{chain[-1]} ({' <- '.join(chain)})"
                )
            for name in _with_parents(target.target):
                if name in modules and name not in came_from:
                    came_from[name] = module.name
                    queue.append(name)


def violations(root: Path) -> list[str]:
    """Every breach of every rule under ``root``, as ``path:line: sentence``."""
    modules = load(root)
    found = [
        *check_allowed(modules, root),
        *check_light(modules, root),
    ]
    return sorted(set(found))


def main() -> int:
    """Print the breaches; exit status 1 if there are any."""
    found = violations(ROOT)
    for line in found:
        print(line)
    print(f"import boundaries: {len(found)} breaches" if found else "import boundaries: clean")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
