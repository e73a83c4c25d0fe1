"""The model itself: one definition for every family, over the paged KV pool.

It reads as the architecture does; what families differ in is in `config.ModelConfig`. Everything
here can be captured in a CUDA graph: no shape depends on data, and nothing is read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from pagedd_daemon.models.config import ModelConfig, Rope
from pagedd_daemon.models.model import read_model
from pagedd_daemon.models.weights import Progress, Weights, load_weights, random_weights
from pagedd_kernels import gated, linear, paged_attention, rms_norm, rope_write
from pagedd_kernels.batch import AttentionShape, StepBatch


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer; matrices are ``[out, in]`` in the model's dtype, norms float32 or more.

    With F = `ModelConfig.width`, H heads of D elements, K of them for keys and values, and M =
    `ModelConfig.hidden_width`.
    """

    input_norm: Tensor
    """``[F]``."""
    qkv: Tensor
    """``[(H + 2K) * D, F]``: queries, keys, values."""
    out: Tensor
    """``[F, H * D]``."""
    mlp_norm: Tensor
    """``[F]``."""
    gate_up: Tensor
    """``[2M, F]``: gate, up."""
    down: Tensor
    """``[F, M]``."""
    qkv_bias: Tensor | None = None
    """``[(H + 2K) * D]``."""
    q_norm: Tensor | None = None
    """``[D]``."""
    k_norm: Tensor | None = None
    """``[D]``."""
    post_attention_norm: Tensor | None = None
    """``[F]``."""
    post_mlp_norm: Tensor | None = None
    """``[F]``."""


class Decoder:
    """Token ids to logits, keys and values in a paged pool."""

    def __init__(self, config: ModelConfig, weights: Weights, context_tokens: int) -> None:
        """A decoder of weights that are there.

        Args:
            config: What they are the weights of.
            weights: All of `tensor_names.parameters`, on one device.
            context_tokens: The longest sequence that will be served.
        """
        self.config = config
        self.context_tokens = context_tokens
        self.embedding = weights[None, "embedding"]
        self.final_norm = weights[None, "final_norm"]
        self.head = weights.get((None, "head"), self.embedding)
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        names = [field.name for field in fields(Layer)]
        self.layers = [
            Layer(**{name: weights[i, name] for name in names if (i, name) in weights})
            for i in range(config.layers)
        ]
        ropes = {attention.rope for attention in config.attention}
        tables = {rope: cos_sin_table(rope, context_tokens, self.device) for rope in ropes}
        self._cos_sin = [tables[attention.rope] for attention in config.attention]
        # Rounded as the training code rounds it.
        self._embed_scale = torch.tensor(config.embed_scale).to(self.dtype).item()
        self._shapes: dict[int, list[AttentionShape]] = {}

    @classmethod
    def load(
        cls,
        path: Path,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None = None,
        context_tokens: int | None = None,
    ) -> Decoder:
        """Read a model from a GGUF file or from a folder in Hugging Face's layout.

        Args:
            path: The file or the folder.
            device: Where the weights go.
            dtype: Of weights and activations.
            progress: Told bytes read and bytes in all.
            context_tokens: The longest sequence that will be served; None for the model's own.

        Raises:
            UnsupportedModelError: The architecture is not one the torch backend computes.
            ModelFileError: A file or a tensor is missing or wrong; said before memory is taken.
            torch.OutOfMemoryError: The device has too little memory.
        """
        stored = read_model(path)
        weights = load_weights(stored, device, dtype, progress)
        return cls(stored.config, weights, context_tokens or stored.config.context_tokens)

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        context_tokens: int | None = None,
    ) -> Decoder:
        """A decoder of random weights, made on the device in a second or so."""
        weights = random_weights(config, device, dtype, seed)
        return cls(config, weights, context_tokens or config.context_tokens)

    @property
    def weight_bytes(self) -> int:
        """Bytes of everything held on the device."""
        tensors = {self.embedding, self.head, self.final_norm, *self._cos_sin}
        for layer in self.layers:
            tensors |= {getattr(layer, field.name) for field in fields(Layer)} - {None}
        return sum(tensor.nbytes for tensor in tensors)

    def forward(self, batch: StepBatch, kv: Tensor) -> Tensor:
        """One step: writes the keys and values of its tokens, and gives the logits asked for.

        Args:
            batch: T tokens of S sequences, of which N rows are asked for.
            kv: The pool, ``[blocks, layers, 2, block_tokens, kv_heads, head_dim]``, in the model's
                dtype.

        Returns:
            Logits, ``[N, vocab_size]`` in the model's dtype.
        """
        return self._through(range(len(self.layers)), batch, kv)

    def rehearse(self, batch: StepBatch, kv: Tensor) -> None:
        """Launch what `forward` would, with one layer of each kind: the others launch the same
        kernels on other weights. What is computed means nothing.

        Args:
            batch: Of padding, which writes to no sequence's blocks.
            kv: See `forward`.
        """
        kinds = self.config.attention
        first = [index for index, kind in enumerate(kinds) if kinds.index(kind) == index]
        self._through(first, batch, kv)

    def _through(self, layers: Sequence[int], batch: StepBatch, kv: Tensor) -> Tensor:
        """Logits after some of the layers."""
        eps = self.config.norm_eps
        x = functional.embedding(batch.tokens, self.embedding)
        if self._embed_scale != 1.0:
            x = x * self._embed_scale
        residual = x
        x = rms_norm(x, self.layers[0].input_norm, eps)
        shapes = self._attention_shapes(kv.shape[3])
        for index in layers:
            layer = self.layers[index]
            x = self._attend(x, index, layer, shapes[index], batch, kv)
            if layer.post_attention_norm is not None:
                x = rms_norm(x, layer.post_attention_norm, eps)
            x, residual = rms_norm(x, layer.mlp_norm, eps, residual)
            x = linear(gated(linear(x, layer.gate_up), self.config.activation), layer.down)
            if layer.post_mlp_norm is not None:
                x = rms_norm(x, layer.post_mlp_norm, eps)
            if index + 1 < len(self.layers):
                x, residual = rms_norm(x, self.layers[index + 1].input_norm, eps, residual)
        rows = batch.logit_rows
        x, _ = rms_norm(x[rows], self.final_norm, eps, residual[rows])
        return self._logits(x)

    def _attend(
        self,
        x: Tensor,
        index: int,
        layer: Layer,
        shape: AttentionShape,
        batch: StepBatch,
        kv: Tensor,
    ) -> Tensor:
        """The attention half of a layer, ``[T, F]`` to ``[T, F]``."""
        qkv = linear(x, layer.qkv)
        if layer.qkv_bias is not None:
            qkv += layer.qkv_bias
        q = rope_write(
            qkv,
            self._cos_sin[index],
            batch,
            kv,
            index,
            shape,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=self.config.norm_eps,
        )
        return linear(paged_attention(q, kv, index, batch, shape).flatten(1), layer.out)

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = linear(x, self.head)
        cap = self.config.logit_soft_cap
        return torch.tanh(logits / cap) * cap if cap else logits

    def _attention_shapes(self, block_tokens: int) -> Sequence[AttentionShape]:
        shapes = self._shapes.get(block_tokens)
        if shapes is None:
            config = self.config
            shapes = self._shapes[block_tokens] = [
                AttentionShape(
                    heads=config.heads,
                    kv_heads=config.kv_heads,
                    head_dim=config.head_dim,
                    block_tokens=block_tokens,
                    scale=config.attention_scale,
                    window=attention.window,
                    soft_cap=config.attention_soft_cap,
                )
                for attention in config.attention
            ]
        return shapes


def cos_sin_table(rope: Rope, context_tokens: int, device: torch.device) -> Tensor:
    """Cosines, then sines, of every position: float32 ``[context_tokens, dims]``.

    Angles are products of float32, as they are in training.
    """
    frequencies = torch.tensor(rope.frequencies(context_tokens), dtype=torch.float32, device=device)
    positions = torch.arange(context_tokens, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1) * rope.magnitude
