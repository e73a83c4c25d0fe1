"""Tokenisers of model folders, made with the library `tokenizers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.support.hf_models import MODELS


def write_smollm2_tokenizer(source: Path, folder: Path) -> None:
    """The packaged model's tokeniser, out of its GGUF file, as its own folder has it."""
    reader = gguf.GGUFReader(source)

    def strings(key: str) -> list[str]:
        field = reader.fields[key]
        return [bytes(field.parts[i]).decode() for i in field.data]

    words = strings("tokenizer.ggml.tokens")
    merges = [(left, right) for left, right in map(str.split, strings("tokenizer.ggml.merges"))]
    kinds = reader.fields["tokenizer.ggml.token_type"]
    control = {i for i, at in enumerate(kinds.data) if kinds.parts[at][0] == gguf.TokenType.CONTROL}
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(words[i], normalized=False, special=True) for i in sorted(control)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (template,) = strings("tokenizer.chat_template")
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "add_bos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)


def write_sentencepiece_tokenizer(folder: Path) -> None:
    """Byte fallback, a start token, and a space in front of every text, like Llama 2's."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words += ["▁", "h", "i", "▁h", "▁hi", "a", "<tool>"]
    tokenizer = Tokenizer(
        models.BPE(
            {w: i for i, w in enumerate(words)},
            [("▁", "h"), ("▁h", "i")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(w, special=True) for w in words[:3]])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "chat_template": [
            {"name": "tool_use", "template": "never"},
            {"name": "default", "template": "{{ bos_token }}{{ messages[0]['content'] }}"},
        ],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_small_weights(folder: Path, vocab_size: int, **changes: Any) -> None:
    """A llama model with this vocabulary."""
    import transformers

    config = MODELS["llama"]()
    config.vocab_size = vocab_size
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    factory: Any = transformers.AutoModelForCausalLM
    factory.from_config(config).save_pretrained(folder)
