"""Which stored tensors make up which weights of the decoder, and in what shapes they must be.

A decoder has fewer and larger matrices than a file: queries, keys and values are one product, and
so are gate and up. `parameters` lists them in the order of the computation, each with the pieces it
is stacked from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

from pagedd_daemon.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor, as it must be."""

    name: str
    shape: tuple[int, ...]
    """Rows first, whatever the file's own order."""
    row: int
    """Where in the weight its first row goes."""
    interleaved: int = 0
    """Rows per head, where the file keeps the two halves of a rotated head interleaved; else 0."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A weight of the decoder."""

    key: str
    """The attribute of `decoder.Decoder` or of `decoder.Layer`."""
    layer: int | None
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    plus_one: bool = False
    """The file keeps the factor less 1."""

    @property
    def is_norm(self) -> bool:
        """Whether it is the factor of an RMSNorm."""
        return self.key.endswith("norm")


@dataclass(frozen=True, slots=True)
class Naming:
    """How a kind of file names its tensors, by `Parameter.key`."""

    layer: str
    """In front of a layer's names, with ``{}`` for its number."""
    names: Mapping[str, tuple[str, ...]]
    plus_one: bool = False
    """Factors of norms are stored less 1 (Gemma, in Hugging Face's layout)."""
    interleaved: bool = False
    """Rows of queries and keys are stored for adjacent pairs to be rotated (llama, in GGUF)."""

    def with_names(self, **names: tuple[str, ...]) -> Naming:
        """The same, with some names changed."""
        return replace(self, names={**self.names, **names})


HUGGING_FACE = Naming(
    "model.layers.{}.",
    {
        "embedding": ("model.embed_tokens.weight",),
        "final_norm": ("model.norm.weight",),
        "head": ("lm_head.weight",),
        "input_norm": ("input_layernorm.weight",),
        "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "q_norm": ("self_attn.q_norm.weight",),
        "k_norm": ("self_attn.k_norm.weight",),
        "out": ("self_attn.o_proj.weight",),
        "mlp_norm": ("post_attention_layernorm.weight",),
        "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "down": ("mlp.down_proj.weight",),
    },
)

HUGGING_FACE_GEMMA = replace(
    HUGGING_FACE.with_names(
        post_attention_norm=("post_attention_layernorm.weight",),
        mlp_norm=("pre_feedforward_layernorm.weight",),
        post_mlp_norm=("post_feedforward_layernorm.weight",),
    ),
    plus_one=True,
)

HUGGING_FACE_PHI3 = HUGGING_FACE.with_names(
    qkv=("self_attn.qkv_proj.weight",), gate_up=("mlp.gate_up_proj.weight",)
)

GGUF = Naming(
    "blk.{}.",
    {
        "embedding": ("token_embd.weight",),
        "final_norm": ("output_norm.weight",),
        "head": ("output.weight",),
        "input_norm": ("attn_norm.weight",),
        "qkv": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
        "qkv_bias": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
        "q_norm": ("attn_q_norm.weight",),
        "k_norm": ("attn_k_norm.weight",),
        "out": ("attn_output.weight",),
        "post_attention_norm": ("post_attention_norm.weight",),
        "mlp_norm": ("ffn_norm.weight",),
        "gate_up": ("ffn_gate.weight", "ffn_up.weight"),
        "down": ("ffn_down.weight",),
        "post_mlp_norm": ("post_ffw_norm.weight",),
    },
)

GGUF_LLAMA = replace(GGUF, interleaved=True)

GGUF_PHI3 = GGUF.with_names(qkv=("attn_qkv.weight",), gate_up=("ffn_up.weight",))


def parameters(config: ModelConfig, naming: Naming) -> list[Parameter]:
    """Every weight of a decoder, in the order of the computation."""
    width = config.width
    wanted = [_parameter(config, naming, "embedding", None, (config.vocab_size,), width)]
    for layer in range(config.layers):
        wanted += _of_layer(config, naming, layer)
    wanted.append(_parameter(config, naming, "final_norm", None, (width,)))
    if not config.tied_head:
        wanted.append(_parameter(config, naming, "head", None, (config.vocab_size,), width))
    return wanted


def _of_layer(config: ModelConfig, naming: Naming, layer: int) -> Iterator[Parameter]:
    width, hidden = config.width, config.hidden_width
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim

    def one(key: str, rows: tuple[int, ...], columns: int | None = None) -> Parameter:
        return _parameter(config, naming, key, layer, rows, columns)

    yield one("input_norm", (width,))
    yield one("qkv", (q, kv, kv), width)
    if config.qkv_bias:
        yield one("qkv_bias", (q, kv, kv))
    if config.qk_norm:
        yield one("q_norm", (config.head_dim,))
        yield one("k_norm", (config.head_dim,))
    yield one("out", (width,), q)
    if config.post_norms:
        yield one("post_attention_norm", (width,))
    yield one("mlp_norm", (width,))
    yield one("gate_up", (hidden, hidden), width)
    yield one("down", (width,), hidden)
    if config.post_norms:
        yield one("post_mlp_norm", (width,))


def _parameter(
    config: ModelConfig,
    naming: Naming,
    key: str,
    layer: int | None,
    rows: tuple[int, ...],
    columns: int | None = None,
) -> Parameter:
    names = naming.names[key]
    tail = () if columns is None else (columns,)
    total = sum(rows)
    if len(names) == 1:
        rows = (total,)  # merged in the file too
    prefix = "" if layer is None else naming.layer.format(layer)
    rotated = key in ("qkv", "qkv_bias") and naming.interleaved
    pieces = tuple(
        Piece(
            prefix + name,
            (count, *tail),
            start,
            config.head_dim if rotated and index < 2 else 0,
        )
        for index, (name, count, start) in enumerate(
            zip(names, rows, accumulate(rows, initial=0), strict=False)
        )
    )
    plus_one = naming.plus_one and key.endswith("norm")
    return Parameter(key, layer, (total, *tail), pieces, plus_one)
