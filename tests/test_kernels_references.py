"""The torch references against loops over single numbers, and against torch's own functions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pagedd_kernels import copy_blocks, gated, paged_attention, rms_norm, rope_write
from tests.support.kernels import World, close, shape_of, world

RAGGED = [(1, 1), (1, 16), (1, 17), (5, 5), (3, 32), (7, 40), (2, 0), (16, 16)]


def naive_attention(w: World) -> Tensor:
    """One query, one head, one key at a time."""
    shape, batch = w.shape, w.batch
    out = torch.zeros(w.q.shape, dtype=torch.float64)
    for s, context in enumerate(batch.context_lens.tolist()):
        first, end = batch.query_starts[s : s + 2].tolist()
        for row in range(first, end if context else first):
            position = context - (end - row)
            low = max(0, position - shape.window + 1) if shape.window else 0
            for head in range(shape.heads):
                scores, values = [], []
                for key in range(low, position + 1):
                    block = batch.block_tables[s, key // shape.block_tokens].item()
                    at = w.kv[int(block), w.layer, :, key % shape.block_tokens, head // shape.group]
                    score = float(w.q[row, head].double() @ at[0].double()) * shape.scale
                    if shape.soft_cap:
                        score = shape.soft_cap * math.tanh(score / shape.soft_cap)
                    scores.append(score)
                    values.append(at[1].double())
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                out[row, head] = weights @ torch.stack(values)
    return out


@pytest.mark.parametrize(
    ("window", "soft_cap"), [(0, 0.0), (4, 0.0), (16, 0.0), (0, 0.7), (7, 1.5)]
)
def test_attention_is_what_a_loop_over_keys_gives(window: int, soft_cap: float) -> None:
    shape = shape_of(4, 2, 16, window=window, soft_cap=soft_cap)
    w = world(shape, RAGGED, dtype=torch.float64, seed=window)
    out = paged_attention(w.q, w.kv, w.layer, w.batch, shape)
    close(out, naive_attention(w), 1e-12)


def test_attention_of_whole_prompts_is_torchs() -> None:
    shape = shape_of(6, 2, 32)
    w = world(shape, [(50, 50)], dtype=torch.float32)
    pages = w.kv[w.batch.block_tables[0, :4].long(), w.layer]
    k, v = (pages[:, i].flatten(0, 1)[:50].repeat_interleave(3, 1) for i in (0, 1))
    expected = functional.scaled_dot_product_attention(
        w.q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
    )
    close(paged_attention(w.q, w.kv, w.layer, w.batch, shape), expected.transpose(0, 1), 1e-5)


def test_norm_is_torchs_with_the_residual_rounded_first() -> None:
    x, residual = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1)).unbind()
    weight = torch.linspace(-1, 1, 40)
    close(rms_norm(x, weight, 1e-5), functional.rms_norm(x, [40], weight, 1e-5), 1e-6)
    out, total = rms_norm(x.half(), weight, 1e-5, residual.half(), plus_one=True)
    assert torch.equal(total, x.half() + residual.half())
    expected = functional.rms_norm(total.float(), [40], weight + 1, 1e-5)
    close(out, expected.half(), 1e-6)


@pytest.mark.parametrize("rotary", [16, 8])
@pytest.mark.parametrize("norm", [False, True])
def test_rope_turns_pairs_and_writes_keys_and_values(rotary: int, norm: bool) -> None:
    shape = shape_of(4, 2, 16)
    w = world(shape, RAGGED, dtype=torch.float64)
    random = torch.Generator().manual_seed(2)
    qkv = torch.randn(len(w.q), 8 * 16, generator=random, dtype=torch.float64)
    angles = torch.rand(64, rotary // 2, generator=random) * 3
    weights = torch.rand(2, 16, generator=random, dtype=torch.float64) if norm else (None, None)
    before = w.kv.clone()
    table = torch.cat([angles.cos(), angles.sin()], 1)
    q = rope_write(qkv, table, w.batch, w.kv, 1, shape, weights[0], weights[1], 1e-6)
    heads = qkv.view(-1, 8, 16)
    touched = torch.zeros(w.kv.shape[0], 16, dtype=torch.bool)
    slots = w.batch.slots.tolist()
    for t, position in enumerate(w.batch.positions.tolist()):
        slot = slots[t]
        touched[slot // 16, slot % 16] = True
        for h in range(6):
            x = heads[t, h]
            weight = weights[0] if h < 4 else weights[1]
            if weight is not None:
                x = x / (x.square().mean() + 1e-6).sqrt() * weight
            expected = x.clone()
            for i in range(rotary // 2):
                j = i + rotary // 2
                cos, sin = table[position, i].item(), table[position, j].item()
                expected[i] = x[i] * cos - x[j] * sin
                expected[j] = x[j] * cos + x[i] * sin
            if h < 4:
                close(q[t, h], expected, 1e-12)
            elif slot >= 16:  # padding rows share the padding block's slots
                close(w.kv[slot // 16, 1, 0, slot % 16, h - 4], expected, 1e-12)
        if slot >= 16:
            assert torch.equal(w.kv[slot // 16, 1, 1, slot % 16], heads[t, 6:])
    untouched = ~touched
    assert torch.equal(w.kv[:, 0].nan_to_num(7), before[:, 0].nan_to_num(7))
    left = w.kv[:, 1].transpose(1, 2)[untouched].nan_to_num(7)
    assert torch.equal(left, before[:, 1].transpose(1, 2)[untouched].nan_to_num(7))


def test_gates_are_torchs_activations() -> None:
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
    gate, up = x.chunk(2, -1)
    close(gated(x, "silu"), functional.silu(gate) * up, 1e-6)
    close(gated(x, "gelu_tanh"), functional.gelu(gate, approximate="tanh") * up, 1e-6)


def test_copied_blocks_hold_all_layers_bit_for_bit() -> None:
    w = world(shape_of(2, 1, 16), [(1, 100)])
    before = w.kv.view(torch.int32).clone()
    copy_blocks(w.kv, torch.tensor([1, 3]), torch.tensor([5, 2]))
    expected = before.clone()
    expected[5], expected[2] = before[1], before[3]
    assert torch.equal(w.kv.view(torch.int32), expected)
