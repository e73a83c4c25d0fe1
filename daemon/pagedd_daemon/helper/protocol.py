"""What front and helper say to each other: msgpack arrays in the frames of `pagedd_daemon.link`.

The front sends one request at a time and the helper answers each once, in order.

=============================================  ====================================================
request                                        result
=============================================  ====================================================
``["ping"]``                                   null
``["open", source]``                           map, see `OPENED`
``["close", source]``                          null
``["tokenize", source, text, special, bos]``   ``ids``
``["chat", source, messages, tools, args,      ``[ids, text, rewritten]``
generation, bos, known]``
``["grammar", source, kind, text]``             null; err ``E_GRAMMAR`` where it is refused
=============================================  ====================================================

``source`` is the absolute path of a model file or folder, `SIMULATED` or `SIMULATED_IDS`. ``ids``
are packed little-endian int32. ``known`` is null or the text whose ids the caller has already:
where the rendered text begins with it, only the ids of the rest come back, and ``rewritten`` is
false.

An answer is ``["ok", retire, result]`` or ``["err", retire, code, message, details]``. ``retire``
says that the process has served or grown enough and wants to be replaced.

This module is imported by the front: it imports nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

SIMULATED = "simulated"
"""A vocabulary of 256 bytes, end of generation (256) and start (257), with a trivial template."""
SIMULATED_IDS = "simulated-ids"
"""A vocabulary of 1,024 ids without a tokeniser."""

OPENED = (
    "digest",  # 32 bytes, of the weights
    "vocab_size",
    "bos",  # -1: none
    "eos",  # -1: none
    "eog",  # ids that end a generation, packed
    "add_bos",  # the model wants its start token in front of a prompt
    "has_tokenizer",
    "has_chat_template",
    "space_prefix",  # the tokeniser puts a space in front of a text
    "lengths",  # bytes of each piece, packed int32
    "pieces",  # all pieces, one after the other
)
"""Keys of an ``open`` result."""


@dataclass(frozen=True, slots=True)
class HelperLimits:
    """What one helper process may take."""

    request_s: float = 5.0
    """Wall-clock seconds for one request; then the process is killed."""
    grammar_s: float = 2.0
    """Wall-clock seconds to compile a grammar and its first mask; ordinary ones take 0.1 s, most of
    it for the vocabulary, once for each process."""
    request_s_per_mib: float = 5.0
    """Further seconds for each MiB of it: tokenising takes 0.3 s per MiB on one free core."""
    open_s: float = 30.0
    """Wall-clock seconds to open a model: 0.1 s, but the file may lie on a slow disk."""
    queue_s: float = 30.0
    """Wall-clock seconds a request may wait for a free process."""
    slow_s: float = 0.25
    """A request that runs for longer no longer counts: another process is started beside it."""
    cpu_s: int = 10
    """Processor seconds for one request, in case the front cannot kill the process."""
    memory_bytes: int = 512 * 2**20
    """Address space beyond what the process has at its start."""
    memory_per_header_byte: int = 24
    """Further address space for each byte of an opened model's header: a vocabulary takes ten times
    the bytes of its header."""
    descriptors: int = 64
    """Open files."""
    requests: int = 20_000
    """Requests before the process is replaced."""
    growth_bytes: int = 256 * 2**20
    """Growth of its largest resident size, beyond opened models, before it is replaced."""
