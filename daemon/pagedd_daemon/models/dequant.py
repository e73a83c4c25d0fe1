"""GGUF's quantised blocks to numbers, in torch, on whatever device the bytes are.

Formats: the ``block_*`` structures of llama.cpp's ``ggml-common.h`` and the ``dequantize_row_*``
functions of ``ggml-quants.c``. Each function takes the bytes of n blocks, uint8 ``[n, size]``, and
gives float32 ``[n, elements]``; products are formed in the order ggml forms them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pagedd_daemon.models.stored import BLOCKS

PLAIN: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
"""Types that need no decoding."""


def decode(raw: Tensor, kind: str, rows: int, columns: int) -> Tensor:
    """The numbers in the bytes of whole rows.

    Args:
        raw: uint8, contiguous, as many as the rows take.
        kind: A key of `PLAIN` or of `DEQUANTISERS`.
        rows: How many.
        columns: Elements of a row, a multiple of the type's block.

    Returns:
        ``[rows, columns]``: a view of ``raw`` in its own type if that is plain, else float32.
    """
    plain = PLAIN.get(kind)
    if plain is not None:
        return raw.view(plain).view(rows, columns)
    _, size = BLOCKS[kind]
    return DEQUANTISERS[kind](raw.view(-1, size)).view(rows, columns)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The 16-bit floats at a byte of each block, float32 ``[n, 1]``."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


@functools.cache
def _table(device: torch.device, values: tuple[int, ...]) -> Tensor:
    """Made once: making a tensor on a GPU waits for all work in front of it."""
    return torch.tensor(values, dtype=torch.uint8, device=device)


def _shifts(like: Tensor, *by: int) -> Tensor:
    return _table(like.device, by)


def _nibbles(packed: Tensor, group: int) -> Tensor:
    """Low halves of ``group`` bytes, then their high halves, and so on: uint8 ``[n, 2 * m]``."""
    n = packed.shape[0]
    grouped = packed.reshape(n, -1, 1, group)
    return ((grouped >> _shifts(packed, 0, 4).view(1, 1, 2, 1)) & 15).reshape(n, -1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """32 bits to the fifth bit of each element: uint8 ``[n, 32]`` of 0 and 16."""
    bits = (packed.unsqueeze(-1) >> _shifts(packed, *range(8))) & 1
    return bits.reshape(packed.shape[0], 32) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 2:], 16).float() - 8) * _half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:], 16).float() * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return (q.float() - 16) * _half(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return q.float() * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _crumbs(packed: Tensor) -> Tensor:
    """Two bits per element, four elements 32 apart per byte: uint8 ``[n, 16, 16]``."""
    n = packed.shape[0]
    grouped = packed.reshape(n, 2, 1, 32)
    spread = (grouped >> _shifts(packed, 0, 2, 4, 6).view(1, 1, 4, 1)) & 3
    return spread.reshape(n, 16, 16)


def _q2_k(blocks: Tensor) -> Tensor:
    scales, d, d_min = blocks[:, :16], _half(blocks, 80), _half(blocks, 82)
    scale = (d * (scales & 15).float()).unsqueeze(-1)
    least = (d_min * (scales >> 4).float()).unsqueeze(-1)
    return (scale * _crumbs(blocks[:, 16:80]).float() - least).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    n = blocks.shape[0]
    high_mask, packed = blocks[:, :32], blocks[:, 96:108]
    low = _nibbles(packed[:, :8], 8)
    high = (packed[:, 8:].unsqueeze(1) >> _shifts(blocks, 0, 2, 4, 6).view(1, 4, 1)) & 3
    scales = (low | (high.reshape(n, 16) << 4)).float() - 32
    scale = (_half(blocks, 108) * scales).unsqueeze(-1)
    bits = (high_mask.unsqueeze(1) >> _shifts(blocks, *range(8)).view(1, 8, 1)) & 1
    q = _crumbs(blocks[:, 32:96]).float() - 4 * (1 - bits.reshape(n, 16, 16).float())
    return (scale * q).flatten(1)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and eight 6-bit minima out of 12 bytes: float32 ``[n, 8, 1]`` each."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], 1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], 1)
    return scales.float().unsqueeze(-1), minima.float().unsqueeze(-1)


def _scaled(blocks: Tensor, q: Tensor) -> Tensor:
    """Elements of a Q4_K or Q5_K block, from their unsigned values ``[n, 256]``."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    d, d_min = _half(blocks, 0).unsqueeze(-1), _half(blocks, 2).unsqueeze(-1)
    return (d * scales * q.view(-1, 8, 32).float() - d_min * minima).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled(blocks, _nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: Tensor) -> Tensor:
    bits = (blocks[:, 16:48].unsqueeze(1) >> _shifts(blocks, *range(8)).view(1, 8, 1)) & 1
    return _scaled(blocks, _nibbles(blocks[:, 48:], 32) | (bits.flatten(1) << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128], 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    high = (high >> _shifts(blocks, 0, 2, 4, 6).view(1, 1, 4, 1)) & 3
    q = (low | (high.flatten(1) << 4)).view(-1, 16, 16).float() - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return ((_half(blocks, 208) * scales).unsqueeze(-1) * q).flatten(1)


DEQUANTISERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""By ggml's name of the type."""
