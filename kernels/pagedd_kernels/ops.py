"""The public functions. Tensors on a CUDA device go to the Triton kernels, others to torch.

None of them reads a value back from the device, so all can be captured in a CUDA graph; grids come
from shapes and from the upper bounds of a `StepBatch`.
Triton is imported only where there is a CUDA tensor, so the references run without it.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, overload

from torch import Tensor
from torch.nn import functional

from pagedd_kernels import references
from pagedd_kernels.batch import AttentionShape, StepBatch
from pagedd_kernels.params import Sampled, SampleParams
from pagedd_kernels.plans import linear_plan

Gate: TypeAlias = Literal["silu", "gelu_tanh"]


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: None = None, *, plus_one: bool = False
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor, *, plus_one: bool = False
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    *,
    plus_one: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm over the last dimension, of ``x`` or of ``x + residual``.

    Args:
        x: [T, F], contiguous.
        weight: [F], of any floating type.
        eps: Added to the mean square.
        residual: [T, F] of the type of ``x``: the sum, rounded to that type, is what is normalised.
        plus_one: Multiply by 1 + weight, as Gemma's checkpoints mean it.

    Returns:
        The norm [T, F] in the type of ``x``; with ``residual`` also the sum.
    """
    if x.is_cuda:
        from pagedd_kernels.gpu import norm

        normalised, total = norm.rms_norm(x, weight, eps, residual, plus_one)
    else:
        normalised, total = references.rms_norm(x, weight, eps, residual, plus_one)
    return normalised if residual is None else (normalised, total)


def rope_write(
    qkv: Tensor,
    cos_sin: Tensor,
    batch: StepBatch,
    kv: Tensor,
    layer: int,
    shape: AttentionShape,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotary embedding of Q and K (NeoX halves), and K and V into the pool.

    Args:
        qkv: [T, (H + 2K) * D], contiguous: the merged product.
        cos_sin: float32 [P, R]: cosines, then sines, of R/2 frequencies at each position; only the
            first R of D dimensions turn.
        batch: Positions and slots are used.
        kv: The pool [blocks, layers, 2, block_tokens, K, D]; the step's slots are written.
        layer: Which layer of it.
        shape: Heads and sizes.
        q_norm: [D] or None: RMS norm weight of each query head, before the rotation.
        k_norm: The same for each key head. Both or none.
        eps: Of these norms.

    Returns:
        q [T, H, D], contiguous.
    """
    if qkv.is_cuda:
        from pagedd_kernels.gpu import rope

        return rope.rope_write(qkv, cos_sin, batch, kv, layer, shape, q_norm, k_norm, eps)
    return references.rope_write(qkv, cos_sin, batch, kv, layer, shape, q_norm, k_norm, eps)


def paged_attention(
    q: Tensor, kv: Tensor, layer: int, batch: StepBatch, shape: AttentionShape
) -> Tensor:
    """Causal attention of the step's tokens over their sequences' blocks.

    Args:
        q: [T, H, D], contiguous.
        kv: The pool; K and V of the step's tokens are in it already.
        layer: Which layer of it.
        batch: Tables, starts and lengths are used.
        shape: Heads, scale, window, soft cap.

    Returns:
        [T, H, D] in the type of ``q``; zeros for padding.
    """
    if q.is_cuda:
        from pagedd_kernels.gpu import decode, varlen

        if batch.max_query == 1:
            return decode.decode_attention(q, kv, layer, batch, shape)
        return varlen.varlen_attention(q, kv, layer, batch, shape)
    return references.paged_attention(q, kv, layer, batch, shape)


def gated(gate_up: Tensor, kind: Gate) -> Tensor:
    """``act(gate) * up`` of a merged product.

    Args:
        gate_up: [T, 2F], contiguous: gate, then up.
        kind: The activation.

    Returns:
        [T, F].
    """
    if gate_up.is_cuda:
        from pagedd_kernels.gpu import gating

        return gating.gated(gate_up, kind)
    return references.gated(gate_up, kind)


def copy_blocks(kv: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy whole blocks, all layers of them: the copies of copy-on-write.

    Args:
        kv: The pool, contiguous.
        src: int64 [n]: blocks to copy from.
        dst: int64 [n]: blocks to copy to; none of them twice, none of them in ``src``.
    """
    if kv.is_cuda:
        from pagedd_kernels.gpu import blocks

        blocks.copy_blocks(kv, src, dst)
        return
    references.copy_blocks(kv, src, dst)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``: [M, K] with [N, K] gives [M, N]."""
    if x.is_cuda and x.element_size() == 2:
        plan = linear_plan(x.shape[0], weight.shape[0])
        if plan is not None:
            from pagedd_kernels.gpu import linear as narrow

            return narrow.linear(x, weight, plan)
    return functional.linear(x, weight)


def sample(logits: Tensor, params: SampleParams) -> Sampled:
    """Draw one token of each row; counts of penalised rows are brought up to date.

    Args:
        logits: [N, vocab], of any floating type; not changed.
        params: How.

    Returns:
        Tokens, and what `SampleParams.logprobs` asks for.
    """
    if logits.is_cuda:
        from pagedd_kernels.gpu import sampling

        return sampling.sample(logits, params)
    return references.sample(logits, params)
