"""A tensor in a file: the same for GGUF and safetensors, so that one loader reads both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pagedd_daemon.models.config import ModelConfig
from pagedd_daemon.models.errors import ModelFileError
from pagedd_daemon.models.ggml_types import TENSOR_TYPES
from pagedd_daemon.models.tensor_names import Naming, Parameter, Piece, parameters

BLOCKS: Mapping[str, tuple[int, int]] = {
    name: (elements, size) for name, elements, size in TENSOR_TYPES.values()
}
"""Elements and bytes of one block of each type, by its name; plain types have blocks of one."""

READABLE = frozenset(
    "F32 F16 BF16 F64 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K".split()  # noqa: SIM905
)
"""Types whose weights can be loaded: those `dequant` knows."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies and how it is encoded."""

    name: str
    path: Path
    offset: int
    """Bytes from the start of the file."""
    size: int
    """Bytes."""
    kind: str
    """One of ggml's type names; safetensors' plain types have the same names."""
    shape: tuple[int, ...]
    """Rows first; the last dimension is contiguous."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model in files whose headers have been checked."""

    path: Path
    """The GGUF file, or the folder."""
    config: ModelConfig
    naming: Naming
    tensors: Mapping[str, StoredTensor]
    digest: bytes
    """32 bytes that name the weights."""

    def plan(self) -> list[tuple[Parameter, list[StoredTensor]]]:
        """Every weight with the tensors it is stacked from, all of the right shape and type.

        Raises:
            ModelFileError: One is missing or one too many, has another shape than the configuration
                says, or a type that cannot be read; names file and tensor.
        """
        plan = [
            (parameter, [self._tensor(parameter, piece) for piece in parameter.pieces])
            for parameter in parameters(self.config, self.naming)
        ]
        used = {piece.name for parameter, _ in plan for piece in parameter.pieces}
        layers = self.naming.layer.partition("{")[0]
        for name in sorted(self.tensors.keys() - used):
            # Overlooked, it would mean another model than the file's; tables can be made anew.
            if name.startswith(layers) and not name.endswith("rotary_emb.inv_freq"):
                raise ModelFileError(
                    self.path,
                    f"has a tensor {name!r} that {self.config.architecture} models do not have",
                    {"tensor": name},
                )
        return plan

    def _tensor(self, parameter: Parameter, piece: Piece) -> StoredTensor:
        tensor = self.tensors.get(piece.name)
        if tensor is None:
            if parameter.key == "head":
                raise ModelFileError(
                    self.path,
                    f"has no output head: no tensor {piece.name!r}, and the model is not said to "
                    "use its embedding for it",
                    {"tensor": piece.name},
                )
            raise ModelFileError(self.path, f"has no tensor {piece.name!r}", {"tensor": piece.name})
        if tensor.shape != piece.shape:
            raise ModelFileError(
                tensor.path,
                f"has tensor {piece.name!r} of shape {list(tensor.shape)}; by its configuration it "
                f"should be {list(piece.shape)}",
                {
                    "tensor": piece.name,
                    "shape": list(tensor.shape),
                    "expected_shape": list(piece.shape),
                },
            )
        if tensor.kind not in READABLE or (len(piece.shape) == 1 and BLOCKS[tensor.kind][0] > 1):
            instead = "; llama.cpp may: --backend llama.cpp" if tensor.path == self.path else ""
            raise ModelFileError(
                tensor.path,
                f"has tensor {piece.name!r} of type {tensor.kind}, which the torch backend cannot "
                f"read{instead}",
                {"tensor": piece.name, "type": tensor.kind},
            )
        return tensor
