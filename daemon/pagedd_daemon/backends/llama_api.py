"""The few calls of llama.cpp that the daemon needs, over the low-level bindings.

One class for the model and one for a context with many sequences. Nothing here knows of blocks,
pages or requests; nothing above here knows of ctypes. The facts about llama.cpp are those of
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

# Read once, when the library is loaded. By default llama.cpp's idle threads spin for milliseconds
# after a step, on the very cores that front and apps need to pass its tokens on; 5,000 rounds are
# enough for the barriers inside a step. Worth 1 to 3 % of decode speed with 4 apps on 2 cores.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import llama_cpp
import numpy as np
import numpy.typing as npt

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

VERSION: str = llama_cpp.__version__
"""Of the binding: the layout of saved states goes with it."""
SEQUENCE_IDS = 256
"""`LLAMA_MAX_SEQ`: more than this a context cannot tell apart."""

KV_TYPES: dict[str, tuple[int, int]] = {
    "f16": (llama_cpp.GGML_TYPE_F16, 2),
    "f32": (llama_cpp.GGML_TYPE_F32, 4),
}
"""KV types with a fast attention kernel: ggml's number and bytes per value. Pairs without one run
25 to 45 times slower without a word, so no other type is let in."""

_LEVELS = {3: logging.WARNING, 4: logging.ERROR}

_BY_DESIGN = ("n_ctx_seq", "default pooling_type")
"""In the warnings that all cells together are more than one sequence may use, since they are for
many; and that hidden states are not pooled, since the engine adds them up."""


class _Log:
    """llama.cpp's warnings and errors as log records; what it prints below that is dropped.

    It prints file names, tensor shapes and ids of sequences, and never the text of a prompt.
    """

    def __init__(self) -> None:
        self.recent: deque[str] = deque(maxlen=8)
        """The last lines, for the details of an exception."""
        self._callback = llama_cpp.llama_log_callback(self._receive)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _receive(self, level: int, text: bytes, _: object) -> None:
        known = _LEVELS.get(level)
        line = text.decode("utf-8", "replace").strip() if known else ""
        if known and line and not any(word in line for word in _BY_DESIGN):
            self.recent.append(line)
            log.log(known, "llama.cpp: %s", line)


_messages: _Log | None = None


def messages() -> _Log:
    """Where llama.cpp's messages go; set up with the first call."""
    global _messages
    if _messages is None:
        llama_cpp.llama_backend_init()
        _messages = _Log()
    return _messages


class Model:
    """Weights and vocabulary."""

    def __init__(self, path: str, progress: Callable[[float], None]) -> None:
        """Load a GGUF file.

        Raises:
            OSError: llama.cpp refused it; `messages` has its reasons.
        """
        messages()

        def report(fraction: float, _: object) -> bool:
            progress(fraction)
            return True

        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        callback = llama_cpp.llama_progress_callback(report)
        params.progress_callback = callback
        self.pointer = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.pointer:
            raise OSError(f"llama.cpp cannot load {path}")
        self._vocab = llama_cpp.llama_model_get_vocab(self.pointer)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.context_tokens: int = llama_cpp.llama_model_n_ctx_train(self.pointer)
        self.width: int = llama_cpp.llama_model_n_embd(self.pointer)
        """Numbers of a hidden state."""
        self.size_bytes: int = llama_cpp.llama_model_size(self.pointer)
        self.window_tokens: int = llama_cpp.llama_model_n_swa(self.pointer)
        """Length of a sliding attention window, 0 for none."""

    def eog_tokens(self) -> frozenset[int]:
        """Ids that end a generation."""
        is_eog = llama_cpp.llama_vocab_is_eog
        return frozenset(t for t in range(self.vocab_size) if is_eog(self._vocab, t))

    def unsupported(self) -> str | None:
        """Why the model cannot be served in pages, or None."""
        if llama_cpp.llama_model_is_recurrent(self.pointer):
            return "a recurrent model keeps one state per sequence and no keys and values"
        if llama_cpp.llama_model_is_hybrid(self.pointer):
            return "a hybrid model keeps recurrent states beside keys and values"
        if llama_cpp.llama_model_has_encoder(self.pointer):
            return "an encoder-decoder model does not continue text"
        if not llama_cpp.llama_model_has_decoder(self.pointer):
            return "a model without a decoder does not continue text"
        if llama_cpp.llama_model_is_diffusion(self.pointer):
            return "a diffusion model does not continue text token by token"
        return None

    def kv_values_per_token(self) -> int:
        """Numbers that the keys and values of one token take, over all layers."""
        heads = llama_cpp.llama_model_n_head_kv(self.pointer)
        width = llama_cpp.llama_model_n_embd(self.pointer) // max(
            1, llama_cpp.llama_model_n_head(self.pointer)
        )
        arch = self._meta("general.architecture")
        key = int(self._meta(f"{arch}.attention.key_length") or width)
        value = int(self._meta(f"{arch}.attention.value_length") or width)
        return int(llama_cpp.llama_model_n_layer(self.pointer) * heads * (key + value))

    def _meta(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(128)
        size = llama_cpp.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if size >= 0 else ""

    def close(self) -> None:
        """Free the weights. Idempotent."""
        if self.pointer:
            llama_cpp.llama_model_free(self.pointer)
            self.pointer = None


@dataclass(frozen=True, slots=True)
class ContextOptions:
    """The shape of a context."""

    cells: int
    """Tokens of KV over all sequences."""
    step_tokens: int
    """Input tokens of one decode at most."""
    threads: int
    kv_type: str
    """A key of `KV_TYPES`."""
    flash_attention: bool
    sequences: int = SEQUENCE_IDS
    embeddings: bool = False
    """Keep the last hidden state of every wanted token."""


class Context:
    """One KV cache for up to `SEQUENCE_IDS` sequences that share cells."""

    def __init__(self, model: Model, options: ContextOptions) -> None:
        """Allocate the cells.

        Raises:
            MemoryError: llama.cpp could not; `messages` has its reasons.
        """
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = options.cells
        params.n_batch = params.n_ubatch = options.step_tokens
        params.n_seq_max = options.sequences
        params.n_outputs_max = max(options.sequences, options.step_tokens)
        if options.embeddings:
            params.embeddings = True
            params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
        params.n_threads = params.n_threads_batch = options.threads
        params.type_k = params.type_v = KV_TYPES[options.kv_type][0]
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if options.flash_attention
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.kv_unified = True
        params.swa_full = True
        params.offload_kqv = params.op_offload = False
        params.no_perf = True
        self._pointer = llama_cpp.llama_init_from_model(model.pointer, params)
        if not self._pointer:
            raise MemoryError(f"llama.cpp cannot make a context of {options.cells} cells")
        self._memory = llama_cpp.llama_get_memory(self._pointer)
        self._vocab = model.vocab_size
        self._width = model.width
        self._logits = np.zeros((0, self._vocab), np.float32)
        self._logits_at = 0
        self.cells: int = llama_cpp.llama_n_ctx(self._pointer)
        # The arrays of the batch are ours, so a step is filled by NumPy and not one call per token.
        n = options.step_tokens
        self.tokens = np.zeros(n, np.int32)
        self.positions = np.zeros(n, np.int32)
        self.sequences = np.zeros(n, np.int32)
        self.wanted = np.zeros(n, np.int8)
        """Whether logits are wanted after this token."""
        # Setting one entry of an array through NumPy costs three times as much.
        self.tokens_view = self.tokens.data
        self.positions_view = self.positions.data
        self._ones = np.ones(n, np.int32)
        self._sequence_of = self.sequences.ctypes.data + 4 * np.arange(n + 1, dtype=np.uint64)
        self._sequence_of[n] = 0
        ints, flags = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_int8)
        self._batch = llama_cpp.llama_batch(
            token=ctypes.cast(self.tokens.ctypes.data, ints),
            pos=ctypes.cast(self.positions.ctypes.data, ints),
            n_seq_id=ctypes.cast(self._ones.ctypes.data, ints),
            seq_id=ctypes.cast(self._sequence_of.ctypes.data, ctypes.POINTER(ints)),
            logits=ctypes.cast(self.wanted.ctypes.data, flags),
        )

    def decode(self, tokens: int) -> int:
        """Compute the first ``tokens`` entries of the batch arrays; 0, or llama.cpp's error.

        The calling thread does the work, outside the interpreter's lock.
        """
        self._batch.n_tokens = tokens
        status: int = llama_cpp.llama_decode(self._pointer, self._batch)
        return status

    def logits(self, rows: int) -> npt.NDArray[np.float32]:
        """Logits of the wanted tokens, in batch order, shape ``(rows, vocab)``.

        A view of llama.cpp's own memory, overwritten by the next decode.
        """
        at = ctypes.addressof(llama_cpp.llama_get_logits(self._pointer).contents)
        if at != self._logits_at or rows > len(self._logits):
            flat = (ctypes.c_float * (rows * self._vocab)).from_address(at)
            self._logits = np.ctypeslib.as_array(flat).reshape(rows, self._vocab)
            self._logits_at = at
        return self._logits[:rows]

    def hidden(self, rows: int) -> npt.NDArray[np.float32]:
        """Last hidden states of the wanted tokens, in batch order, shape ``(rows, width)``.

        A view of llama.cpp's own memory, overwritten by the next decode.
        """
        at = ctypes.addressof(llama_cpp.llama_get_embeddings(self._pointer).contents)
        flat = (ctypes.c_float * (rows * self._width)).from_address(at)
        return np.ctypeslib.as_array(flat).reshape(rows, self._width)

    def share(self, source: int, target: int, start: int, end: int) -> None:
        """``target`` becomes a holder of the cells of ``source`` at positions start to end - 1."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, start, end)

    def remove(self, sequence: int, start: int = -1, end: int = -1) -> None:
        """``sequence`` gives up its cells at positions start to end - 1; -1 stands for no bound."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, start, end)

    def held(self, sequence: int) -> tuple[int, int]:
        """First and last position that ``sequence`` holds, (-1, -1) for none."""
        return (
            llama_cpp.llama_memory_seq_pos_min(self._memory, sequence),
            llama_cpp.llama_memory_seq_pos_max(self._memory, sequence),
        )

    def save(self, sequence: int, buffer: Bytes) -> int:
        """Write all cells of ``sequence`` into ``buffer``; bytes written, 0 on failure."""
        target = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        size: int = llama_cpp.llama_state_seq_get_data(self._pointer, target, buffer.size, sequence)
        return size

    def restore(self, sequence: int, data: Bytes) -> bool:
        """Make ``sequence`` hold what was saved as ``data`` and nothing else."""
        source = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        read: int = llama_cpp.llama_state_seq_set_data(self._pointer, source, data.size, sequence)
        return read == data.size

    def close(self) -> None:
        """Free the cells. Idempotent."""
        if self._pointer:
            llama_cpp.llama_free(self._pointer)
            self._pointer = None
