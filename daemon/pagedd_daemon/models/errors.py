"""What is wrong with a model file or a model's name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ModelError(Exception):
    """A model cannot be used; on the wire this is ``E_MODEL``.

    Attributes:
        code: ``E_MODEL``.
        message: For people.
        details: The figures, as they go on the wire.
    """

    code = "E_MODEL"

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = dict(details or {})


class UnknownModelError(ModelError):
    """No model goes by this name; ``details`` has ``name`` and the ``nearest`` names."""


class ModelFileError(ModelError):
    """A file is missing, unreadable or no model.

    Attributes:
        path: The file.
        reason: What is wrong with it, as part of a sentence.
    """

    def __init__(self, path: Path, reason: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"{path}: {reason}", {**(details or {}), "path": str(path)})
        self.path = path
        self.reason = reason


class UnsupportedModelError(ModelError):
    """Well-formed, but not a model the torch backend computes; llama.cpp may."""


class ModelTooLargeError(ModelError):
    """Weights and the least KV do not fit into the free memory; ``details`` has the figures."""
