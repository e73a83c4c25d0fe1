"""What a path holds: a GGUF file or a folder in Hugging Face's layout, headers checked."""

from __future__ import annotations

from pathlib import Path

from pagedd_daemon.models.folder import FolderHeader, read_folder, read_folder_header
from pagedd_daemon.models.gguf_config import read_gguf_model
from pagedd_daemon.models.gguf_header import GgufHeader, read_header
from pagedd_daemon.models.stored import StoredModel

ModelHeader = GgufHeader | FolderHeader


def read_model_header(path: Path) -> ModelHeader:
    """What the headers of the model at a path say, checked: for listings and tokenisers.

    Raises:
        UnsupportedModelError: A folder's architecture is not one the torch backend computes, which
            alone could run it.
        ModelFileError: A file is missing or wrong.
    """
    return read_folder_header(path) if path.is_dir() else read_header(path)


def read_model(path: Path) -> StoredModel:
    """The model at a path: its configuration and where its tensors lie.

    Raises:
        UnsupportedModelError: The architecture is not one the torch backend computes.
        ModelFileError: A file is missing or wrong.
    """
    return read_folder(path) if path.is_dir() else read_gguf_model(path)
