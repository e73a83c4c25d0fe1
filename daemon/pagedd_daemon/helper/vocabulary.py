"""Vocabularies: text to token ids, and the bytes each id stands for."""

from __future__ import annotations

import ctypes
import re
from array import array
from collections.abc import Mapping
from typing import Any, Protocol

from pagedd_daemon.helper.folder_vocabulary import FolderVocabulary
from pagedd_daemon.helper.protocol import SIMULATED
from pagedd_daemon.models.errors import ModelFileError
from pagedd_daemon.models.folder import FolderHeader
from pagedd_daemon.models.gguf_header import GgufHeader
from pagedd_daemon.models.model import ModelHeader


class Vocabulary(Protocol):
    """What a model's tokeniser knows."""

    size: int
    bos: int
    eos: int
    eog: tuple[int, ...]
    add_bos: bool
    space_prefix: bool
    """Puts a space in front of a text and after a special token."""
    template: str | None
    """The chat template of the model file."""
    specials: Mapping[int, str]
    """Tokens that steer the model and stand for no text, with the spelling that stands for them in
    a template."""
    piece_lengths: array[int]
    """Bytes of each id, by id; 0 for special tokens."""
    pieces: bytes
    """The bytes of all ids, one after the other."""

    def encode(self, text: bytes, *, special: bool, glued: bool = False) -> array[int]:
        """The ids of a text, without start and end tokens.

        Args:
            text: UTF-8.
            special: The spelling of a special token stands for that token, not for itself.
            glued: The text continues another, so no space is put in front of it.
        """
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class ByteVocabulary:
    """The simulated model's: ids 0 to 255 are bytes."""

    size = 258
    bos = 257
    eos = 256
    eog: tuple[int, ...] = (256,)
    add_bos = False
    space_prefix = False
    template: str | None = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    specials: Mapping[int, str] = {256: "<|end|>", 257: "<|begin|>"}
    piece_lengths = array("i", [1] * 256 + [0, 0])
    pieces = bytes(range(256))

    _SPECIAL = re.compile(rb"<\|end\|>|<\|begin\|>|.", re.DOTALL)
    _IDS: Mapping[bytes, int] = {b"<|end|>": 256, b"<|begin|>": 257}

    def encode(self, text: bytes, *, special: bool, glued: bool = False) -> array[int]:
        """See `Vocabulary.encode`."""
        if not special or b"<|" not in text:
            return array("i", list(text))  # of bytes, array would take four for one id
        return array("i", [self._IDS.get(m, m[0]) for m in self._SPECIAL.findall(text)])

    def close(self) -> None:
        """Nothing is held."""


class LlamaVocabulary:
    """A GGUF file's, through llama.cpp, which loads nothing but the vocabulary."""

    def __init__(self, header: GgufHeader) -> None:
        """Load the vocabulary of a file whose header has been checked.

        Raises:
            ModelFileError: llama.cpp does not accept it.
        """
        import llama_cpp.llama_cpp as native  # 0.1 s and 20 MB: only where a file is opened

        self._native = native
        log = _Log(native)
        params = native.llama_model_default_params()
        params.vocab_only = True
        params.use_mmap = False
        self._model = native.llama_model_load_from_file(bytes(header.path), params)
        if not self._model:
            raise ModelFileError(
                header.path, f"was refused by llama.cpp: {log.first_error or 'no reason given'}"
            )
        vocab = self._vocab = native.llama_model_get_vocab(self._model)
        self.size = int(native.llama_vocab_n_tokens(vocab))
        self.bos = int(native.llama_vocab_bos(vocab))
        self.eos = int(native.llama_vocab_eos(vocab))
        self.add_bos = bool(native.llama_vocab_get_add_bos(vocab)) and self.bos >= 0
        template = native.llama_model_chat_template(self._model, None)
        self.template = template.decode("utf-8", "replace") if template else None
        self._buffer = (native.llama_token * 4096)()
        self._read_pieces()
        enders = {*self.specials, self.eos, int(native.llama_vocab_eot(vocab))}
        self.eog = tuple(
            sorted(i for i in enders if i >= 0 and native.llama_vocab_is_eog(vocab, i))
        )
        self._probe = self._raw(b"\n", special=False)
        first = self._raw(b"a", special=False)[:1]
        self.space_prefix = bool(first) and self._piece(first[0]).startswith(b" ")

    def _read_pieces(self) -> None:
        """The byte pieces by llama.cpp's own rules, for every kind of vocabulary."""
        to_piece, vocab = self._native.llama_token_to_piece, self._vocab
        buffer = ctypes.create_string_buffer(1024)
        lengths = array("i")
        pieces: list[bytes] = []
        specials: dict[int, str] = {}
        for token in range(self.size):
            length = to_piece(vocab, token, buffer, len(buffer), 0, False)
            if length < 0:
                buffer = ctypes.create_string_buffer(-length)
                length = to_piece(vocab, token, buffer, len(buffer), 0, False)
            lengths.append(length)
            pieces.append(ctypes.string_at(buffer, length))
            if not length and self._is_special(token):
                text = self._native.llama_vocab_get_text(vocab, token)
                specials[token] = text.decode("utf-8", "replace")
        self.piece_lengths = lengths
        self.pieces = b"".join(pieces)
        self.specials: Mapping[int, str] = specials

    def _is_special(self, token: int) -> bool:
        native = self._native
        attributes = int(native.llama_vocab_get_attr(self._vocab, token))
        return bool(
            attributes & (native.LLAMA_TOKEN_ATTR_CONTROL | native.LLAMA_TOKEN_ATTR_UNKNOWN)
        )

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        length = self._native.llama_token_to_piece(self._vocab, token, buffer, 64, 0, False)
        return buffer.raw[: max(length, 0)]

    def encode(self, text: bytes, *, special: bool, glued: bool = False) -> array[int]:
        """See `Vocabulary.encode`."""
        if not text:
            return array("i")
        if glued and self.space_prefix:
            # llama.cpp cannot be told that a text continues another. A line break in front takes
            # the space, and is a token of its own, so both can be cut off again.
            ids = self._raw(b"\n" + text, special=special)
            if ids[: len(self._probe)] == self._probe:
                return ids[len(self._probe) :]
        return self._raw(text, special=special)

    def _raw(self, text: bytes, *, special: bool) -> array[int]:
        count = self._tokenize(text, special)
        if count < 0:
            self._buffer = (self._native.llama_token * -count)()
            count = self._tokenize(text, special)
        ids = array("i")
        ids.frombytes(ctypes.string_at(self._buffer, count * 4))
        if len(self._buffer) > 65_536:
            self._buffer = (self._native.llama_token * 4096)()
        return ids

    def _tokenize(self, text: bytes, special: bool) -> int:
        buffer = self._buffer
        return int(
            self._native.llama_tokenize(
                self._vocab, text, len(text), buffer, len(buffer), False, special
            )
        )

    def close(self) -> None:
        """Free the model."""
        self._native.llama_model_free(self._model)


class _Log:
    """Keeps llama.cpp's first complaint, and the rest of its log away from the terminal."""

    _callback: Any = None  # llama.cpp holds the pointer for the life of the process
    first_error = ""

    def __init__(self, native: Any) -> None:
        _Log.first_error = ""
        if _Log._callback is None:
            _Log._callback = native.llama_log_callback(self._take)
            native.llama_log_set(_Log._callback, ctypes.c_void_p(0))

    @staticmethod
    def _take(level: int, text: bytes, _data: Any) -> None:
        if level == 4 and not _Log.first_error:  # GGML_LOG_LEVEL_ERROR
            _Log.first_error = text.decode("utf-8", "replace").strip()[:300]


def open_vocabulary(source: str, header: ModelHeader | None) -> Vocabulary:
    """The vocabulary of a checked file or folder, or of the simulated model."""
    if source == SIMULATED:
        return ByteVocabulary()
    assert header is not None
    return FolderVocabulary(header) if isinstance(header, FolderHeader) else LlamaVocabulary(header)
