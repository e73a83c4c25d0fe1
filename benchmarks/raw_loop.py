"""What the daemon is measured against: the plainest decode loop over the same bindings.

One multi-sequence llama.cpp context with the daemon's own parameters, one token per sequence and
step, llama.cpp's own sampler chain, and nothing else: no scheduler, no pager, no other process.
Also the judge of texts: it teacher-forces a given text and tells how good each token was.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass

import llama_cpp
import numpy as np

from benchmarks.worker import Answer, serve


@dataclass(frozen=True, slots=True)
class Options:
    """Parameters of the context; those of the daemon it is compared with."""

    model: str
    cells: int
    threads: int
    batch: int
    kv_dtype: str
    flash_attention: bool


class RawLoop:
    """A context and a batch."""

    def __init__(self, options: Options) -> None:
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(options.model.encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {options.model}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = options.cells
        params.n_batch = params.n_ubatch = options.batch
        params.n_seq_max = 256
        params.n_threads = params.n_threads_batch = options.threads
        params.kv_unified = True
        params.flash_attn_type = 1 if options.flash_attention else 0
        kind = llama_cpp.GGML_TYPE_F32 if options.kv_dtype == "f32" else llama_cpp.GGML_TYPE_F16
        params.type_k = params.type_v = kind
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp could not make a context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._capacity = options.batch
        self._batch = llama_cpp.llama_batch_init(options.batch, 0, 1)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        is_end = llama_cpp.llama_vocab_is_eog
        self._ends = [token for token in range(self._vocab_size) if is_end(vocab, token)]

    def _put(self, at: int, token: int, position: int, sequence: int, wanted: bool) -> None:
        batch = self._batch
        batch.token[at] = token
        batch.pos[at] = position
        batch.n_seq_id[at] = 1
        batch.seq_id[at][0] = sequence
        batch.logits[at] = wanted

    def _decode(self, tokens: int) -> None:
        self._batch.n_tokens = tokens
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int, sampling: Answer) -> Answer:
        """Generate ``tokens`` tokens for each prompt, all in step.

        Returns:
            ``tokens`` and ``seconds`` from every sequence's first token to its last.
        """
        llama_cpp.llama_memory_clear(self._memory, False)
        chains = [_chain(sampling, seed) for seed in range(len(prompts))]
        current = [0] * len(prompts)
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                self._put(position, token, position, sequence, position == len(prompt) - 1)
            self._decode(len(prompt))
            current[sequence] = llama_cpp.llama_sampler_sample(chains[sequence], self._context, -1)
        started = time.monotonic()
        for step in range(tokens - 1):
            for sequence, prompt in enumerate(prompts):
                self._put(sequence, current[sequence], len(prompt) + step, sequence, True)
            self._decode(len(prompts))
            for sequence, chain in enumerate(chains):
                current[sequence] = llama_cpp.llama_sampler_sample(chain, self._context, sequence)
        seconds = time.monotonic() - started
        for chain in chains:
            llama_cpp.llama_sampler_free(chain)
        return {"tokens": (tokens - 1) * len(prompts), "seconds": seconds}

    def score(self, prompt: Sequence[int], reply: Sequence[int], chunk: int) -> Answer:
        """Teacher-force ``prompt + reply``, ``chunk`` tokens at a time.

        Returns:
            Per token of the reply: ``best`` and ``second``, the two largest logits of its position
            but for those of what would end the text, which the replies that are judged may not
            draw (``ignore_eos``), and ``chosen``, the token's own.
        """
        llama_cpp.llama_memory_clear(self._memory, False)
        text = [*prompt, *reply]
        inputs = text[:-1]
        first = len(prompt) - 1
        best: list[float] = []
        second: list[float] = []
        chosen: list[float] = []
        for start in range(0, len(inputs), min(chunk, self._capacity)):
            part = inputs[start : start + min(chunk, self._capacity)]
            for at, token in enumerate(part):
                self._put(at, token, start + at, 0, start + at >= first)
            self._decode(len(part))
            for at in range(max(0, first - start), len(part)):
                pointer = llama_cpp.llama_get_logits_ith(self._context, at)
                logits = np.ctypeslib.as_array(pointer, shape=(self._vocab_size,))
                logits[self._ends] = -np.inf
                low, high = np.partition(logits, self._vocab_size - 2)[-2:]
                best.append(float(high))
                second.append(float(low))
                chosen.append(float(logits[text[start + at + 1]]))
        return {"best": best, "second": second, "chosen": chosen}

    def handle(self, order: Answer) -> Answer:
        """One order of the parent."""
        if order["op"] == "decode":
            return self.decode(order["prompts"], order["tokens"], order["sampling"])
        return self.score(order["prompt"], order["reply"], order["chunk"])


def _chain(sampling: Answer, seed: int) -> llama_cpp.llama_sampler_p:
    """llama.cpp's own samplers, in its default order."""
    params = llama_cpp.llama_sampler_chain_default_params()
    params.no_perf = True
    chain: llama_cpp.llama_sampler_p = llama_cpp.llama_sampler_chain_init(params)
    if sampling["temperature"] == 0:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
        return chain
    for sampler in (
        llama_cpp.llama_sampler_init_top_k(sampling["top_k"]),
        llama_cpp.llama_sampler_init_top_p(sampling["top_p"], 1),
        llama_cpp.llama_sampler_init_temp(sampling["temperature"]),
        llama_cpp.llama_sampler_init_dist(seed),
    ):
        llama_cpp.llama_sampler_chain_add(chain, sampler)
    return chain


def main() -> None:
    """Load the model and answer orders."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--cells", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--kv-dtype", choices=("f16", "f32"), default="f16")
    parser.add_argument("--flash-attention", action=argparse.BooleanOptionalAction, default=True)
    serve(RawLoop(Options(**vars(parser.parse_args()))).handle)


if __name__ == "__main__":
    main()
