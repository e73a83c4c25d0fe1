"""Model files that are nearly right: a small GGUF file and a small folder, damaged by a seed.

Damage is done to what the headers say (counts, types, shapes, places, names, metadata) more often
than to their bytes, so that most of it reaches behind the first check.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from pagedd_daemon.models.ggml_types import TENSOR_TYPES

_EDGES = (0, 1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**63, 2**64 - 1)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of GGUF's scalar types."""
_STRING, _ARRAY = 8, 9
_LONGEST = 2**18
"""Bytes of a tensor that is moved: damaged shapes may say anything."""
_OPTIONAL = (
    *((b"rope_freqs.weight", 8), (b"output_norm.bias", 64), (b"blk.0.attn_q.bias", 64)),
    *((b"blk.0.attn_output.bias", 64), (b"blk.0.ffn_gate.bias", 128), (b"blk.1.ffn_up.bias", 128)),
)
"""Names and lengths."""


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@dataclass
class _Tensor:
    name: bytes
    shape: list[int]
    kind: int
    offset: int
    dimensions: int | None = None
    """What is said of them, where that is not their number."""

    def packed(self) -> bytes:
        count = len(self.shape) if self.dimensions is None else self.dimensions
        head = _text(self.name) + struct.pack("<I", count % 2**32)
        shape = b"".join(struct.pack("<Q", n % 2**64) for n in self.shape)
        return head + shape + struct.pack("<IQ", self.kind % 2**32, self.offset % 2**64)


@dataclass
class Gguf:
    """The parts of a GGUF file, version 3."""

    entries: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    """Key, type and value."""
    tensors: list[_Tensor] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int, int] | None = None
    """What is said of tensors and entries, where that is not their number."""

    @classmethod
    def read(cls, path: Path) -> Gguf:
        """The parts of a good file."""
        raw, at = path.read_bytes(), 24

        def take(form: str) -> int:
            nonlocal at
            (value,) = struct.unpack_from(form, raw, at)
            at += struct.calcsize(form)
            return int(value)

        def text() -> bytes:
            nonlocal at
            size = take("<Q")
            at += size
            return raw[at - size : at]

        def skip(kind: int) -> None:
            nonlocal at
            if kind == _STRING:
                text()
            elif kind == _ARRAY:
                inner, count = take("<I"), take("<Q")
                for _ in range(count):
                    skip(inner)
            else:
                at += _SIZES[kind]

        tensors, entries = struct.unpack_from("<QQ", raw, 8)
        parts = cls()
        for _ in range(entries):
            key, kind, begin = text(), take("<I"), 0
            begin = at
            skip(kind)
            parts.entries.append((key, kind, raw[begin:at]))
        for _ in range(tensors):
            name, count = text(), take("<I")
            shape = [take("<Q") for _ in range(count)]
            parts.tensors.append(_Tensor(name, shape, take("<I"), take("<Q")))
        parts.data = raw[-(-at // 32) * 32 :]
        return parts

    def packed(self) -> bytes:
        """The file."""
        tensors, entries = self.counts or (len(self.tensors), len(self.entries))
        head = self.magic + struct.pack("<IQQ", self.version, tensors % 2**64, entries % 2**64)
        head += b"".join(_text(k) + struct.pack("<I", t % 2**32) + v for k, t, v in self.entries)
        head += b"".join(tensor.packed() for tensor in self.tensors)
        return head + bytes(-len(head) % 32) + self.data

    def lay_out(self) -> None:
        """Move the tensors' data to where a writer puts it: one after the other, without holes."""
        data = b""
        for tensor in self.tensors:
            _, block, block_bytes = TENSOR_TYPES.get(tensor.kind, ("", 1, 4))
            size = min(math.prod(tensor.shape) // block * block_bytes, _LONGEST)
            old = self.data[tensor.offset : tensor.offset + size]
            tensor.offset = len(data)
            data += old + bytes(size - len(old)) + bytes(-size % 32)
        self.data = data

    def copy(self) -> Gguf:
        """One to be damaged."""
        tensors = [replace(tensor, shape=list(tensor.shape)) for tensor in self.tensors]
        return replace(self, entries=list(self.entries), tensors=tensors)


class GgufDamage:
    """Damaged copies of one file."""

    def __init__(self, parts: Gguf, dice: random.Random) -> None:
        self._parts = parts
        self._dice = dice
        self._ways: tuple[Callable[[Gguf], None], ...] = (
            *(self._number, self._number, self._number, self._kind, self._key, self._drop),
            *(self._array, self._string, self._shape, self._shape, self._offset, self._name),
            *(self._tensor_kind, self._dimensions, self._counts, self._preamble, self._flood),
            self._optional,
        )

    def next(self) -> tuple[bytes, str]:
        """A damaged file, and what was done to it."""
        dice = self._dice
        parts = self._parts.copy()
        done = []
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            way = dice.choice(self._ways)
            way(parts)
            done.append(way.__name__.strip("_"))
        raw = parts.packed()
        if dice.random() < 0.1:
            raw, how = _bytes(raw, dice, len(raw) - len(parts.data))
            done.append(how)
        return raw, " ".join(done)

    def _entry(self, parts: Gguf) -> int:
        return self._dice.randrange(len(parts.entries)) if parts.entries else -1

    def _number(self, parts: Gguf) -> None:
        """A figure of the metadata at an edge, in its type."""
        dice = self._dice
        places = [i for i, (_, kind, _) in enumerate(parts.entries) if kind in _SIZES]
        if places:
            at = dice.choice(places)
            key, kind, _ = parts.entries[at]
            if kind == 6:
                value = struct.pack("<f", dice.choice((0.0, -1.0, math.nan, math.inf, 1e-45, 1e38)))
            else:
                value = (dice.choice(_EDGES) % 2 ** (8 * _SIZES[kind])).to_bytes(
                    _SIZES[kind], "little"
                )
            parts.entries[at] = (key, kind, value)

    def _kind(self, parts: Gguf) -> None:
        """Another type, with a value of that type or with the bytes as they are."""
        dice = self._dice
        at = self._entry(parts)
        if at >= 0:
            key, _, value = parts.entries[at]
            kind = dice.choice((*range(13), 13, 2**31))
            if dice.random() < 0.6 and kind < 13:
                inner = dice.choice((4, 5, 6, 8, 9))
                value = (
                    _text(b"x" * dice.choice((0, 1, 70_000)))
                    if kind == _STRING
                    else struct.pack("<IQ", inner, 0)
                    if kind == _ARRAY
                    else bytes([dice.randrange(2)]) + bytes(_SIZES[kind] - 1)
                )
            parts.entries[at] = (key, kind, value)

    def _key(self, parts: Gguf) -> None:
        at = self._entry(parts)
        if at >= 0:
            key, kind, value = parts.entries[at]
            other = parts.entries[self._entry(parts)][0]
            odd = (b"", b"\xff", b"k" * 5000, key + b"\0", other, key.upper())
            parts.entries[at] = (self._dice.choice(odd), kind, value)

    def _drop(self, parts: Gguf) -> None:
        if parts.tensors and self._dice.random() < 0.5:
            del parts.tensors[self._dice.randrange(len(parts.tensors))]
        elif parts.entries:
            del parts.entries[self._entry(parts)]

    def _array(self, parts: Gguf) -> None:
        """An array that claims another type, or more or less than it has."""
        dice = self._dice
        places = [i for i, (_, kind, _) in enumerate(parts.entries) if kind == _ARRAY]
        if places:
            at = dice.choice(places)
            key, kind, value = parts.entries[at]
            inner, count = struct.unpack_from("<IQ", value)
            if dice.random() < 0.5:
                inner = dice.choice((*range(14), 2**31))
            else:
                count = dice.choice((*_EDGES, count - 1, count + 1)) % 2**64
            parts.entries[at] = (key, kind, struct.pack("<IQ", inner, count) + value[12:])

    def _string(self, parts: Gguf) -> None:
        dice = self._dice
        places = [i for i, (_, kind, _) in enumerate(parts.entries) if kind == _STRING]
        if places:
            at = dice.choice(places)
            key, kind, value = parts.entries[at]
            odd = (
                struct.pack("<Q", dice.choice(_EDGES)) + value[8:],
                _text(b"\xff\xfe"),
                _text(b""),
                _text(b"\0" * 9),
                _text(b"{% for i in range(10**9) %}{% endfor %}"),
                _text(b"{{ ''.__class__.__mro__ }}"),
            )
            parts.entries[at] = (key, kind, dice.choice(odd))

    def _tensor(self, parts: Gguf) -> _Tensor:
        return self._dice.choice(parts.tensors) if parts.tensors else _Tensor(b"a", [32], 0, 0)

    def _shape(self, parts: Gguf) -> None:
        tensor, dice = self._tensor(parts), self._dice
        way = dice.randrange(4)
        if way == 0:
            tensor.shape = tensor.shape[::-1]
        elif way == 1:
            tensor.shape = [*tensor.shape, dice.choice((1, 2, 2**32))]
        elif tensor.shape:
            at = dice.randrange(len(tensor.shape))
            near = (tensor.shape[at] + 1, tensor.shape[at] - 1, tensor.shape[at] * 2)
            tensor.shape[at] = dice.choice((*near, *_EDGES)) % 2**64

    def _dimensions(self, parts: Gguf) -> None:
        self._tensor(parts).dimensions = self._dice.choice((0, 1, 2, 3, 4, 5, 2**31, 2**32 - 1))

    def _offset(self, parts: Gguf) -> None:
        tensor, other = self._tensor(parts), self._tensor(parts)
        near = (other.offset, tensor.offset + 32, tensor.offset + 1, 2**64 - 32, len(parts.data))
        tensor.offset = self._dice.choice((*near, *_EDGES))

    def _name(self, parts: Gguf) -> None:
        tensor, other = self._tensor(parts), self._tensor(parts)
        odd = (b"", other.name, b"n" * 64, b"\xff", b"blk.9.ffn_up.weight", b"output.weight\0")
        tensor.name = self._dice.choice(odd)

    def _tensor_kind(self, parts: Gguf) -> None:
        """Another type; mostly with the data moved to where it is looked for then, since llama.cpp
        refuses holes."""
        self._tensor(parts).kind = self._dice.choice((*range(42), 2**31, 2**32 - 1))
        if self._dice.random() < 0.7:
            parts.lay_out()

    def _optional(self, parts: Gguf) -> None:
        """A tensor more, which llama.cpp uses where it is there."""
        dice = self._dice
        name, length = dice.choice(_OPTIONAL)
        shape = dice.choice(([length], [length], [length, 1], [length, 2]))
        parts.tensors.append(_Tensor(name, shape, dice.choice((0, 0, *TENSOR_TYPES)), 0))
        parts.lay_out()

    def _counts(self, parts: Gguf) -> None:
        dice = self._dice
        counts = [len(parts.tensors), len(parts.entries)]
        at = dice.randrange(2)
        counts[at] = dice.choice((counts[at] - 1, counts[at] + 1, *_EDGES))
        parts.counts = (counts[0], counts[1])

    def _preamble(self, parts: Gguf) -> None:
        if self._dice.random() < 0.3:
            parts.magic = self._dice.choice((b"GGJT", b"\0\0\0\0", b"FUGG", b"{\0\0\0"))
        else:
            parts.version = self._dice.choice((0, 1, 2, 4, 0x03000000, 2**32 - 1))

    def _flood(self, parts: Gguf) -> None:
        """So many of something that a reader has to work."""
        if self._dice.random() < 0.1:
            count = self._dice.choice((5000, 60_000))
            if self._dice.random() < 0.5:
                parts.entries += [(b"k%d" % i, 4, bytes(4)) for i in range(count)]
            else:
                parts.tensors += [_Tensor(b"t%d" % i, [1], 0, 0) for i in range(count)]
        else:
            count = self._dice.choice((1000, 1000, 1000, 20_000))
            parts.entries.append((b"n", _ARRAY, struct.pack("<IQ", 10, count) + bytes(8 * count)))


def _bytes(raw: bytes, dice: random.Random, header: int) -> tuple[bytes, str]:
    """Damage that knows nothing of structure."""
    if dice.random() < 0.5:
        return raw[: dice.randrange(len(raw) if dice.random() < 0.3 else header)], "cut"
    changed = bytearray(raw)
    for _ in range(dice.choice((1, 2, 8))):
        changed[dice.randrange(min(header, len(raw)))] = dice.randrange(256)
    return bytes(changed), "flip"


# ------------------------------------------------------------------------------------- safetensors

_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_SHAPES = {
    "model.embed_tokens.weight": (64, 32),
    "model.norm.weight": (32,),
    "lm_head.weight": (64, 32),
    "model.layers.0.input_layernorm.weight": (32,),
    "model.layers.0.post_attention_layernorm.weight": (32,),
    "model.layers.0.self_attn.q_proj.weight": (32, 32),
    "model.layers.0.self_attn.k_proj.weight": (16, 32),
    "model.layers.0.self_attn.v_proj.weight": (16, 32),
    "model.layers.0.self_attn.o_proj.weight": (32, 32),
    "model.layers.0.mlp.gate_proj.weight": (48, 32),
    "model.layers.0.mlp.up_proj.weight": (48, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 48),
}
_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "F32", "F64", "BF16", "U8", "F4", [], {}, [[]], [1] * 9, [32, 32]),
    *(-1, 0, 1, 33, 1.5, 1e308, math.nan, math.inf, 2**31, 2**53, 2**63, 2**64, 10**30, "x" * 300),
)


class FolderDamage:
    """Damaged copies of one small folder in Hugging Face's layout."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        numbers = np.random.default_rng(7)
        whole = save({n: numbers.normal(0, 0.2, s).astype("f4") for n, s in _SHAPES.items()})
        (size,) = struct.unpack_from("<Q", whole)
        self._header: dict[str, Any] = json.loads(whole[8 : 8 + size])
        self._data = whole[8 + size :]

    def next(self, folder: Path) -> str:
        """Write a damaged one; returns what was done to it."""
        dice = self._dice
        for path in folder.iterdir():
            path.unlink()
        config, header = dict(_CONFIG), json.loads(json.dumps(self._header))
        done = []
        chance = dice.random()
        if chance < 0.3:
            for _ in range(dice.choice((1, 1, 2))):
                self._change(config)
            done.append("config")
        if chance > 0.25:
            done += [self._tensor(header) for _ in range(dice.choice((1, 1, 2)))]
        text = json.dumps(header).encode()
        raw = struct.pack("<Q", len(text)) + text + self._data
        if chance > 0.85:
            raw, how = self._frame(text, raw)
            done.append(how)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes(raw)
        if dice.random() < 0.1:
            (folder / "model.safetensors.index.json").write_text(json.dumps(self._index()))
            done.append("index")
        return " ".join(done)

    def _change(self, config: dict[str, Any]) -> None:
        dice = self._dice
        key = dice.choice((*config, "rope_scaling", "head_dim", "sliding_window", "num_experts"))
        if dice.random() < 0.2:
            config.pop(key, None)
        else:
            known: Any = config.get(key)
            number = isinstance(known, (int, float))
            near = (known + 1, known * 2, -known) if number else ()
            config[key] = dice.choice((*_VALUES, *near))

    def _tensor(self, header: dict[str, Any]) -> str:
        dice = self._dice
        name = dice.choice(list(header))
        way = dice.randrange(6)
        if way == 0:
            del header[name]
            header.setdefault("model.norm.weight", {})
        elif way == 1:
            odd = ("", "model.layers.9.mlp.up_proj.weight", "n" * 600, "\0", "__metadata__", "é")
            header[dice.choice(odd)] = header[name]
        elif way == 2:
            header[name] = dice.choice(_VALUES)
        elif isinstance(header[name], dict):
            key = ("dtype", "shape", "data_offsets")[way - 3]
            value = header[name].get(key)
            if isinstance(value, list) and value and dice.random() < 0.7:
                value[dice.randrange(len(value))] = dice.choice((*_VALUES, *_EDGES))
            else:
                header[name][key] = dice.choice(_VALUES)
        return ("drop", "name", "entry", "dtype", "shape", "place")[way]

    def _frame(self, text: bytes, raw: bytes) -> tuple[bytes, str]:
        dice = self._dice
        way = dice.randrange(6)
        if way == 0:
            return struct.pack("<Q", dice.choice(_EDGES)) + raw[8:], "length"
        if way == 1:
            return self._whole(b"[" * 100_000), "deep"
        if way == 2:
            return self._whole(text[:-1] + b"," + text[1:]), "twice"
        if way == 3:
            return self._whole(b'{"a":' + b"9" * dice.choice((100, 5000)) + b"}"), "digits"
        if way == 4 and dice.random() < 0.1:
            many = {
                f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
                for i in range(90_000)
            }
            return self._whole(json.dumps(many).encode()), "flood"
        return _bytes(raw, dice, 8 + len(text))

    def _whole(self, text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + self._data

    def _index(self) -> dict[str, Any]:
        dice = self._dice
        odd = ("model.safetensors", "../x", "", "\0", "x" * 300, "a/b", 5, None, "missing")
        names: dict[str, Any] = dict.fromkeys(_SHAPES, "model.safetensors")
        names[dice.choice((*_SHAPES, "extra"))] = dice.choice(odd)
        return {"weight_map": dice.choice((names, names, names, [], None, {"a": []}))}
