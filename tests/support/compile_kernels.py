"""Compiles every kernel for a GPU that need not be there; a program of its own.

The interpreter accepts much that the compiler does not. Launches are turned into compilations for
compute capability 9.0; nothing runs. Triton must not be in interpreter mode.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pagedd_kernels import AttentionShape, Penalties, SampleParams
from pagedd_kernels.gpu import (
    blocks,
    decode,
    device,
    division,
    gating,
    linear,
    norm,
    rope,
    sampling,
    searching,
    softmax,
    varlen,
)
from pagedd_kernels.gpu.decode import decode_attention
from pagedd_kernels.gpu.varlen import varlen_attention
from pagedd_kernels.plans import LinearPlan
from tests.support.kernels import shape_of, world

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def _type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def compile_launch(
    kernel: Any, *args: Any, grid: object, warmup: bool, num_warps: int = 4, num_stages: int = 3,
    **options: Any,
) -> None:  # fmt: skip
    """What `JITFunction.run` is replaced with: compile for these arguments, launch nothing."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    signature = {n: "constexpr" if n in constants else _type(values[n]) for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, p in enumerate(kernel.params)
        if p.name not in constants
        and (
            (isinstance(values[p.name], torch.Tensor) and not p.do_not_specialize_on_alignment)
            or (type(values[p.name]) is int and not p.do_not_specialize and not values[p.name] % 16)
        )
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=HOPPER, options=options)
    shared = compiled.metadata.shared
    assert shared <= SHARED_MEMORY, f"{kernel.__name__} wants {shared} bytes of shared memory"
    print(kernel.__name__, shared)


def _overlap(_: torch.device) -> dict[str, bool]:
    """What `device.overlap` says of Hopper."""
    return {"EARLY": True, "launch_pdl": True}


MIXED = [(700, 700), (1, 9)]
DECODING = ([(1, 900)] * 4, [(1, 30)] * 70)


def _attention(shape: AttentionShape, *steps: list[tuple[int, int]]) -> None:
    for lengths in steps:
        w = world(shape, lengths, dtype=torch.bfloat16)
        attention = varlen_attention if w.batch.max_query > 1 else decode_attention
        attention(w.q, w.kv, 1, w.batch, shape)


def main() -> None:
    """Every launcher once, in the shapes of an 8B model and in odd ones."""
    JITFunction.run = compile_launch
    device.multiprocessors.cache_clear()
    device.INTERPRETED_MULTIPROCESSORS = 132
    for module in (decode, division, gating, linear, norm, rope, searching, softmax, varlen):
        vars(module)["overlap"] = _overlap
    llama, odd = shape_of(32, 8, 128), shape_of(9, 3, 80, window=20, soft_cap=3.0)
    _attention(llama, MIXED, *DECODING)
    _attention(odd, MIXED)
    _attention(shape_of(8, 1, 256), MIXED)
    x = torch.randn(4, 6144).bfloat16()
    w = world(llama, [(1, 30)] * 4, dtype=torch.bfloat16)
    weight = x[0, :128]
    table = torch.rand(64, 128)
    rope.rope_write(x, table, w.batch, w.kv, 1, llama, None, None, 0.0)
    rope.rope_write(x, table, w.batch, w.kv, 1, llama, weight, weight, 1e-6)
    norm.rms_norm(x, x[0], 1e-6, x, False)
    norm.rms_norm(x, x[0], 1e-6, None, True)
    gating.gated(x, "silu")
    gating.gated(x, "gelu_tanh")
    blocks.copy_blocks(w.kv, torch.tensor([1]), torch.tensor([2]))
    linear.linear(x, x, LinearPlan(32, 128, warps=4, stages=3))
    linear.linear(x[:, :200].contiguous(), x[:, :200].contiguous(), LinearPlan(16, 64, 2, 3))
    logits, one = torch.randn(2, 128256), torch.ones(2)
    half = one.double() / 2
    sampling.sample(logits.bfloat16(), SampleParams(logprobs=5))
    sampling.sample(logits, SampleParams(one, half))
    sampling.sample(logits, SampleParams(one, half, one.int(), half, half))
    counts = torch.zeros(2, 128256, dtype=torch.int32)
    penalties = Penalties(one.int(), counts, one, one, one)
    bias = (counts[:, :3], logits[:, :3])
    sampling.adjust(logits, SampleParams(penalties=penalties, bias=bias, masked=counts[:, :3]))
    sampling.adjust(logits, SampleParams(allowed=(one.int(), counts[:, :4008].contiguous())))


if __name__ == "__main__":
    main()
