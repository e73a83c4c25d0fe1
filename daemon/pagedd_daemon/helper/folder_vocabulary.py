"""Vocabularies of model folders in Hugging Face's layout, through the library `tokenizers`."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pagedd_daemon.models.errors import ModelFileError
from pagedd_daemon.models.files import read_bounded, read_json
from pagedd_daemon.models.folder import TOKENIZER, FolderHeader

SETTINGS, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
TOKENIZER_BYTES = 128 * 2**20
"""Gemma 3's, the largest in use, has 33 MB."""
SETTINGS_BYTES = 16 * 2**20
"""Most have a few kilobytes; some list thousands of added tokens."""
TEMPLATE_BYTES = 2**20

_ENDERS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<reponame>", "<|file_sep|>"),
)
"""Special tokens that end a turn, or a file, by convention, whatever a folder says of its end
token. llama.cpp goes by the same spellings."""


class FolderVocabulary:
    """See `vocabulary.Vocabulary`."""

    def __init__(self, header: FolderHeader) -> None:
        """Load the tokeniser of a folder that has been checked.

        Raises:
            ModelFileError: It cannot be read, or knows more tokens than the model has.
        """
        from tokenizers import Tokenizer  # 20 MB: only where a folder is opened

        path = header.path / TOKENIZER
        raw = read_bounded(path, TOKENIZER_BYTES)
        try:
            self._tokenizer = Tokenizer.from_buffer(raw)
        except Exception as error:  # the library has no narrower class
            raise ModelFileError(path, f"was refused by tokenizers: {str(error)[:300]}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        words: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        highest = max(words.values(), default=-1)
        if highest >= header.vocab_size:
            raise ModelFileError(
                path,
                f"has a token {highest}, and the model has an embedding of {header.vocab_size} "
                "rows",
                {"token": highest, "vocab_size": header.vocab_size},
            )
        self.size = header.vocab_size  # often padded beyond the tokeniser's
        added = self._tokenizer.get_added_tokens_decoder()
        self.specials: Mapping[int, str] = {i: t.content for i, t in added.items() if t.special}
        texts = {i: t.content for i, t in added.items() if not t.special}
        self.piece_lengths, self.pieces = self._pieces(words, texts)
        self._read_settings(header)
        self._probe = self._raw("\n")
        first = self._raw("a")[:1]
        self.space_prefix = bool(first) and self._piece(first[0]).startswith(b" ")

    def _read_settings(self, header: FolderHeader) -> None:
        path = header.path / SETTINGS
        settings = read_json(path, SETTINGS_BYTES) if path.is_file() else {}
        self.bos = self._id_of(settings.get("bos_token"))
        self.eos = self._id_of(settings.get("eos_token"))
        if self.eos < 0:
            self.eos = min(header.eog_tokens, default=-1)
        says = settings.get("add_bos_token")
        with_start = self._tokenizer.encode("a", add_special_tokens=True).ids
        if self.bos < 0 and with_start and with_start[0] in self.specials:
            self.bos = with_start[0]
        self.add_bos = self.bos >= 0 and (
            says if isinstance(says, bool) else with_start[:1] == [self.bos]
        )
        enders = {self.eos, *header.eog_tokens, *map(self._id_of, _ENDERS)}
        self.eog = tuple(sorted(i for i in enders if 0 <= i < self.size))
        self.template = _template(header.path, settings)

    def _id_of(self, token: Any) -> int:
        """The id of a token as the settings name it, a text or a map; -1 for none."""
        if isinstance(token, dict):
            token = token.get("content")
        found = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        return -1 if found is None else int(found)

    def _pieces(
        self, words: Mapping[str, int], texts: Mapping[int, str]
    ) -> tuple[array[int], bytes]:
        """The byte pieces: what the decoder would make of each token within a text."""
        decoder = repr(self._tokenizer.decoder)
        to_bytes = _byte_level if "ByteLevel(" in decoder else _byte_fallback
        table = [b""] * self.size
        for word, token in words.items():
            if token not in self.specials:
                table[token] = texts[token].encode() if token in texts else to_bytes(word)
        return array("i", map(len, table)), b"".join(table)

    def _piece(self, token: int) -> bytes:
        start = sum(self.piece_lengths[:token])
        return self.pieces[start : start + self.piece_lengths[token]]

    def encode(self, text: bytes, *, special: bool, glued: bool = False) -> array[int]:
        """See `vocabulary.Vocabulary.encode`."""
        if not text:
            return array("i")
        self._tokenizer.encode_special_tokens = not special
        if glued and self.space_prefix:
            # As with llama.cpp: a line break in front takes the space, and is cut off again.
            ids = self._raw("\n" + text.decode())
            if ids[: len(self._probe)] == self._probe:
                return ids[len(self._probe) :]
        return self._raw(text.decode())

    def _raw(self, text: str) -> array[int]:
        return array("i", self._tokenizer.encode(text, add_special_tokens=False).ids)

    def close(self) -> None:
        """Give the memory back."""
        del self._tokenizer


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, or in the settings, where there may be several."""
    if (folder / TEMPLATE).is_file():
        return read_bounded(folder / TEMPLATE, TEMPLATE_BYTES).decode("utf-8", "replace")
    given = settings.get("chat_template")
    if isinstance(given, list):
        named = {t.get("name"): t.get("template") for t in given if isinstance(t, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else None


def _byte_characters() -> Iterable[tuple[str, int]]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the rest follow 255."""
    following = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            yield chr(byte), byte
        else:
            yield chr(following), byte
            following += 1


_BYTES = dict(_byte_characters())


def _byte_level(word: str) -> bytes:
    try:
        return bytes(map(_BYTES.__getitem__, word))
    except KeyError:
        return word.encode()


def _byte_fallback(word: str) -> bytes:
    """SentencePiece's: ``<0x0A>`` is a byte, and ``▁`` a space."""
    if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
        try:
            return bytes([int(word[3:5], 16)])
        except ValueError:
            pass
    return word.replace("▁", " ").encode()
