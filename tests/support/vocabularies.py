"""Small GGUF files with a vocabulary, a template and next to no weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

END, START = 256, 257
"""``<|im_end|>`` and ``<|im_start|>`` of `byte_level_file`."""


def byte_level_file(path: Path, template: str | None = None, *, tokenizer: bool = True) -> Path:
    """Byte-level BPE without merges: ids 0 to 255 are bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_vocab_size(258)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([*_byte_characters(), "<|im_end|>", "<|im_start|>"])
        writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2)
        writer.add_token_merges(["h e"])
        writer.add_bos_token_id(START)
        writer.add_eos_token_id(END)
    if template is not None:
        writer.add_chat_template(template)
    return _finish(writer, path, 258)


def sentencepiece_file(path: Path) -> Path:
    """SentencePiece with byte fallback, a start token, and a space in front of every text."""
    words = ["▁", "h", "i", "▁h", "▁hi", "a"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    kinds = gguf.TokenType
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
        + [kinds.BYTE] * 256
        + [kinds.NORMAL] * len(words)
    )
    writer.add_token_scores([0.0] * 259 + [-1.0 - i for i in range(len(words))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    return _finish(writer, path, len(tokens))


def _finish(writer: gguf.GGUFWriter, path: Path, vocab_size: int) -> Path:
    writer.add_tensor("token_embd.weight", np.zeros((vocab_size, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _byte_characters() -> list[str]:
    """How byte-level BPE spells bytes (GPT-2's ``bytes_to_unicode``)."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(256) if b not in plain)
    spelling = {b: chr(256 + i) for i, b in enumerate(others)}
    return [spelling.get(b, chr(b)) for b in range(256)]
