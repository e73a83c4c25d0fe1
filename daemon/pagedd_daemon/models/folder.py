"""A model in Hugging Face's layout: a folder with ``config.json`` and safetensors files."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pagedd_daemon.models.config import ModelConfig
from pagedd_daemon.models.errors import ModelFileError
from pagedd_daemon.models.families import config_of, family_of
from pagedd_daemon.models.fields import Fields
from pagedd_daemon.models.files import read_bounded, read_json
from pagedd_daemon.models.safetensors_header import SafetensorsFile, read_safetensors
from pagedd_daemon.models.stored import StoredModel, StoredTensor

CONFIG, GENERATION = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
CONFIG_BYTES = 2**20
"""A configuration has 500 to 10,000."""
INDEX_BYTES = 16 * 2**20
"""An index has about 100 for each tensor; DeepSeek V3's has 9 MB."""
SHARDS = 1024
"""The largest models in use have 163."""


def is_folder_model(path: Path) -> bool:
    """Whether a path is a folder that looks like a model."""
    return path.is_dir() and (path / CONFIG).is_file()


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a model folder.

    Raises:
        UnsupportedModelError: The torch backend does not compute such models.
        ModelFileError: ``config.json`` is missing or wrong.
    """
    if not folder.is_dir():
        reason = "is not a folder" if folder.exists() else "does not exist"
        raise ModelFileError(folder, reason)
    eog: frozenset[int] = frozenset()
    if (folder / GENERATION).is_file():
        path = folder / GENERATION
        eog = Fields(path, read_json(path, CONFIG_BYTES)).ids("eos_token_id")
    path = folder / CONFIG
    return config_of(Fields(path, read_json(path, CONFIG_BYTES)), eog)


@dataclass(frozen=True, slots=True)
class Shards:
    """The safetensors files of a folder."""

    files: tuple[SafetensorsFile, ...]

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)

    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors by name."""
        return {name: t for file in self.files for name, t in file.tensors.items()}


def read_shards(folder: Path) -> Shards:
    """The headers of all safetensors files, checked.

    Raises:
        ModelFileError: One is missing or wrong, or the index names tensors that are not there.
    """
    index = folder / INDEX
    if not index.exists():
        return Shards((read_safetensors(folder / SINGLE),))
    weight_map = read_json(index, INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(index, "has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if len(names) > SHARDS:
        raise ModelFileError(index, f"names {len(names)} files; {SHARDS} is the limit")
    files = {name: _shard(folder, index, name) for name in names}
    for tensor, name in weight_map.items():
        if tensor not in files[str(name)].tensors:
            raise ModelFileError(
                folder / str(name),
                f"has no tensor {tensor[:100]!r}, which {INDEX} says it has",
                {"tensor": tensor[:100]},
            )
    return Shards(tuple(files.values()))


def _shard(folder: Path, index: Path, name: str) -> SafetensorsFile:
    if Path(name).name != name or name in ("", ".", ".."):
        raise ModelFileError(index, f"names a file outside its folder: {name[:100]!r}")
    if not os.path.exists(folder / name):  # false for names that no file can have, too
        raise ModelFileError(folder / name, f"is missing; {INDEX} names it", {"shard": name})
    return read_safetensors(folder / name)


def read_folder(folder: Path) -> StoredModel:
    """A model folder with all its headers checked.

    Raises:
        UnsupportedModelError: The torch backend does not compute such models.
        ModelFileError: A file is missing or wrong.
    """
    config = read_config(folder)
    shards = read_shards(folder)
    tensors = shards.tensors()
    if config.architecture == "Gemma3ForConditionalGeneration":
        tensors = _text_half(tensors)
    naming = family_of(config.architecture).naming
    return StoredModel(folder, config, naming, tensors, folder_digest(folder, shards))


def folder_digest(folder: Path, shards: Shards) -> bytes:
    """32 bytes that name the weights of a folder: SHA-256 over ``config.json`` and its files'."""
    digest = hashlib.sha256(read_bounded(folder / CONFIG, CONFIG_BYTES))
    for file in shards.files:
        digest.update(file.digest)
    return digest.digest()


def _text_half(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The language model within one that also sees, under the names it would have alone."""
    renamed = {}
    for name, tensor in tensors.items():
        for prefix, instead in (("model.language_model.", "model."), ("language_model.", "")):
            if name.startswith(prefix):
                renamed[instead + name.removeprefix(prefix)] = tensor
                break
        else:
            renamed[name] = tensor
    return renamed


@dataclass(frozen=True, slots=True)
class FolderHeader:
    """What the small files and the headers of a folder say; the names are `GgufHeader`'s."""

    path: Path
    architecture: str
    context_length: int
    vocab_size: int
    eog_tokens: frozenset[int]
    parameters: int
    """Elements of all tensors."""
    quantization: str
    """The type most weights have: ``BF16``."""
    size_bytes: int
    """Of all weights' files."""
    tokenizer: str | None
    """`TOKENIZER` if there is one."""
    header_bytes: int
    """Bytes of the tokeniser's file."""
    digest: bytes
    """32 bytes, see `folder_digest`."""


def read_folder_header(folder: Path) -> FolderHeader:
    """Check a model folder and say what is in it.

    Raises:
        UnsupportedModelError: The torch backend does not compute such models.
        ModelFileError: A file is missing or wrong.
    """
    config, shards = read_config(folder), read_shards(folder)
    sizes: Counter[str] = Counter()
    for tensor in shards.tensors().values():
        sizes[tensor.kind] += math.prod(tensor.shape)
    tokenizer = folder / TOKENIZER
    there = tokenizer.is_file()
    if not there and (folder / SENTENCEPIECE).exists():
        raise ModelFileError(
            tokenizer, f"does not exist, and {SENTENCEPIECE} alone cannot be read here"
        )
    return FolderHeader(
        path=folder,
        architecture=config.architecture,
        context_length=config.context_tokens,
        vocab_size=config.vocab_size,
        eog_tokens=config.eog_tokens,
        parameters=sum(sizes.values()),
        quantization=sizes.most_common(1)[0][0],
        size_bytes=shards.size_bytes,
        tokenizer=TOKENIZER if there else None,
        header_bytes=tokenizer.stat().st_size if there else 0,
        digest=folder_digest(folder, shards),
    )
