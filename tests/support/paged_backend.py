"""Paged backends over a tiny random model in float64, and the plain run they must agree with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from pagedd_daemon.backends.paged.backend import PagedBackend
from pagedd_daemon.backends.paged.load import BLOCK_TOKENS, Wishes, serve
from pagedd_daemon.models.config import ModelConfig, Rope, uniform_attention
from pagedd_daemon.models.decoder import Decoder
from tests.support.paged import PagedSequences

VOCAB = 257
CONTEXT = 1024


def tiny_config(**changes: object) -> ModelConfig:
    """A model with grouped query heads, of 100,000 weights."""
    layers = 2
    fields: dict[str, object] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": VOCAB,
        "width": 64,
        "hidden_width": 96,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "context_tokens": CONTEXT,
        "norm_eps": 1e-5,
        "attention": uniform_attention(Rope(10_000.0, 16), [0] * layers),
        "attention_scale": 0.25,
    }
    return ModelConfig(**{**fields, **changes})  # type: ignore[arg-type]


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 1) -> Decoder:
    """Random weights, the same for the same seed."""
    return Decoder.random(tiny_config(), torch.device("cpu"), dtype, seed)


def tiny_backend(
    model: Decoder, *, blocks: int = 64, ram_pages: int = 64, asynchronous: bool = False
) -> PagedBackend:
    """A backend with so many blocks."""
    block_bytes = BLOCK_TOKENS * model.config.kv_bytes_per_token(model.dtype.itemsize)
    wishes = Wishes(
        kv_tokens=blocks * BLOCK_TOKENS,
        ram_bytes=ram_pages * block_bytes,
        asynchronous=asynchronous,
    )
    return serve(model, wishes)


class Plain:
    """One sequence computed in one go, without pager and backend."""

    def __init__(self, model: Decoder) -> None:
        self.model = model

    def logits(self, text: list[int]) -> npt.NDArray[np.float64]:
        """Logits after every token of a text."""
        run = PagedSequences(self.model, [len(text)])
        return run.step({0: text}, every=True).double().numpy()

    def judge(self, text: list[int]) -> npt.NDArray[np.bool_]:
        """See `tests.support.driver.Judge`: exactly the token a plain run draws."""
        best = self.logits(text[:-1]).argmax(axis=1)
        return np.concatenate([[False], best == np.array(text[1:])])

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The likeliest continuation."""
        text = list(prompt)
        for _ in range(count):
            text.append(int(self.logits(text)[-1].argmax()))
        return text[len(prompt) :]
