"""Checks that nothing is unpickled or evaluated, and that there is one decoder and one renderer.

Part of ``make check``. The rules are those of docs/architecture.md, "Who imports whom". Files are
read as syntax trees, and names are followed through their imports, so that
``from torch import load as f`` is found as well as ``torch.load``. A name counts wherever it is
mentioned: what is not called here may be called by whoever it is handed to.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

FOLDERS = ("clients", "daemon", "kvpager", "kernels", "packaging", "benchmarks", "examples")
"""Whose Python files must keep to `check_unsafe`; all of these may run on a user's machine."""

FORBIDDEN_MODULES = frozenset(
    {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    # These pickle whatever is put into them.
    | {"diskcache", "multiprocessing"}
)
FORBIDDEN_NAMES: Mapping[str, str] = {
    "eval": "runs what it is given",
    "exec": "runs what it is given",
    "__import__": "hides from these checks what is imported",
    "torch.jit.load": "runs what the file says",
    "llama_cpp.LlamaDiskCache": "pickles",
    "llama_cpp.llama_cache.LlamaDiskCache": "pickles",
}
FORBIDDEN_METHODS: Mapping[str, str] = {
    "recv_pyobj": "pickles",
    "send_pyobj": "pickles",
    "read_pickle": "pickles",
}
NEVER_TRUE: Mapping[str, str] = {
    "allow_pickle": "unpickles",
    "trust_remote_code": "runs what a model's folder says",
}
"""Arguments of whatever function, and why they must not be switched on."""

DECODERS: Mapping[str, str] = {
    "pagedd._core.decoded": "what a daemon sends",
    "pagedd_daemon.front.wire._unpacked": "what a client sends",
    "pagedd_daemon.link.values": "what another process of this daemon says, or this one has kept",
}
"""The functions that may make values of msgpack, each the only one for its kind of bytes: limits
and the translation of errors are in one place for each."""

RENDERER = "pagedd_daemon.helper.templates"
"""The one module that knows jinja2, and the template that is rendered in one place of it."""

_MSGPACK = frozenset({"unpackb", "unpack", "loads", "load", "Unpacker"})
_OUR_PACKAGES = ("pagedd", "kvpager")
"""What a computed name of a module must begin with."""


@dataclass(frozen=True)
class Source:
    """One parsed file."""

    path: Path
    name: str
    """Dotted, as it is imported: what follows the folder of its component."""
    tree: ast.Module
    imported: Mapping[str, str]
    """What each name that an import binds stands for."""


@dataclass(frozen=True)
class Mention:
    """A name in the code, in full, and the function in which it stands."""

    target: str
    line: int
    function: str
    call: ast.Call | None
    """The call of it, where it is called at once."""


def load(root: Path) -> list[Source]:
    """Every Python file of `FOLDERS` under ``root``."""
    return [_parse(path) for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]


def _parse(path: Path) -> Source:
    folder = path.parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    parts = list(path.relative_to(folder).with_suffix("").parts)
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                imported[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return Source(path, name, tree, imported)


class _Mentions(ast.NodeVisitor):
    """Collects every name and dotted name that code mentions."""

    def __init__(self, source: Source) -> None:
        self.found: list[Mention] = []
        self._source = source
        self._function = source.name
        self._called: dict[ast.expr, ast.Call] = {}

    def _scope(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        outside, self._function = self._function, f"{self._function}.{node.name}"
        self.generic_visit(node)
        self._function = outside

    def _name(self, node: ast.Name | ast.Attribute) -> None:
        target, call = _full_name(self._source, node), self._called.get(node)
        self.found.append(Mention(target, node.lineno, self._function, call))
        self.generic_visit(node)

    def _call(self, node: ast.Call) -> None:
        self._called[node.func] = node
        self.generic_visit(node)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _scope  # noqa: N815
    visit_Name = visit_Attribute = _name  # noqa: N815
    visit_Call = _call  # noqa: N815


def mentions(source: Source) -> list[Mention]:
    """Every name and dotted name that the code of a file mentions."""
    visitor = _Mentions(source)
    visitor.visit(source.tree)
    return visitor.found


def _full_name(source: Source, node: ast.expr) -> str:
    """``a.b.c`` with what ``a`` was imported as; ``.c`` where something else stands before it."""
    if isinstance(node, ast.Name):
        name = source.imported.get(node.id, node.id)
        return name.removeprefix("builtins.")
    if isinstance(node, ast.Attribute):
        owner = _full_name(source, node.value)
        return node.attr if owner == "builtins" else f"{owner}.{node.attr}"
    return ""


def _imported_modules(source: Source) -> Iterator[tuple[str, int]]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or "", node.lineno


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value in (False, None)


# ------------------------------------------------------------------------------------- unsafe


def check_unsafe(sources: Iterable[Source], root: Path) -> Iterator[str]:
    """Modules, functions and arguments that run or unpickle what they are given."""
    for source in sources:
        where = source.path.relative_to(root)
        for module, line in _imported_modules(source):
            if module.partition(".")[0] in FORBIDDEN_MODULES:
                yield f"{where}:{line}: {module.partition('.')[0]} is forbidden"
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.keyword) or _is_false(node.value):
                continue
            if why := NEVER_TRUE.get(node.arg or ""):
                line = node.value.lineno
                yield f"{where}:{line}: {node.arg} other than False {why}: forbidden"
        for mention in mentions(source):
            if reason := _unsafe(mention):
                yield f"{where}:{mention.line}: {reason}"


def _unsafe(mention: Mention) -> str:
    """Why a name is unsafe as it is mentioned, or the empty string."""
    if why := FORBIDDEN_NAMES.get(mention.target):
        return f"{mention.target} {why}: forbidden"
    attribute = mention.target.rpartition(".")[2]
    if why := FORBIDDEN_METHODS.get(attribute):
        return f".{attribute}() {why}: forbidden"
    arguments = {k.arg: k.value for k in mention.call.keywords} if mention.call else {}
    if mention.target == "torch.load" and not _is_true(arguments.get("weights_only")):
        return "torch.load() without weights_only=True unpickles: forbidden"
    if mention.target == "importlib.import_module":
        return _hidden_import(mention.call)
    return ""


def _hidden_import(call: ast.Call | None) -> str:
    """A module may be imported by a written name, or by a computed one of our own packages."""
    first = call.args[0] if call is not None and call.args else None
    if isinstance(first, ast.JoinedStr) and first.values:
        first = first.values[0]
        if isinstance(first, ast.Constant) and str(first.value).startswith(_OUR_PACKAGES):
            return ""
    elif isinstance(first, ast.Constant):
        module = str(first.value).partition(".")[0]
        return f"{module} is forbidden" if module in FORBIDDEN_MODULES else ""
    return "importlib.import_module() of a computed name: forbidden"


# ------------------------------------------------------------------ one decoder, one renderer


def check_one_decoder(sources: Iterable[Source], root: Path) -> Iterator[str]:
    """msgpack becomes values in `DECODERS` alone, once in each."""
    found: dict[str, int] = dict.fromkeys(DECODERS, 0)
    for source in sources:
        if not source.name.startswith(_OUR_PACKAGES):
            continue
        for mention in mentions(source):
            module, _, function = mention.target.rpartition(".")
            if module.partition(".")[0] != "msgpack" or function not in _MSGPACK:
                continue
            if mention.function not in DECODERS:
                where = source.path.relative_to(root)
                yield f"{where}:{mention.line}: msgpack is decoded in {', '.join(DECODERS)} alone"
            else:
                found[mention.function] += 1
    for name, times in found.items():
        if times != 1:
            yield f"{name} decodes msgpack in {times} places instead of one"


def check_one_renderer(sources: Iterable[Source], root: Path) -> Iterator[str]:
    """jinja2 is imported by `RENDERER` alone, which renders in one place."""
    renders = []
    for source in sources:
        if not source.name.startswith(_OUR_PACKAGES):
            continue
        for module, line in _imported_modules(source):
            if module.partition(".")[0] == "jinja2" and source.name != RENDERER:
                yield f"{source.path.relative_to(root)}:{line}: only {RENDERER} may import jinja2"
        if source.name == RENDERER:
            renders += [m.line for m in mentions(source) if m.target.endswith("_template.render")]
    if len(renders) != 1:
        yield f"{RENDERER} renders in {len(renders)} places instead of one"


def violations(root: Path) -> list[str]:
    """Every breach of every rule under ``root``, as ``path:line: sentence``."""
    sources = load(root)
    found = [
        *check_unsafe(sources, root),
        *check_one_decoder(sources, root),
        *check_one_renderer(sources, root),
    ]
    return sorted(set(found))


def main() -> int:
    """Print the breaches; exit status 1 if there are any."""
    found = violations(ROOT)
    for line in found:
        print(line)
    print(f"safety: {len(found)} breaches" if found else "safety: clean")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
