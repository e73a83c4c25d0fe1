"""Grammars of constrained output, compiled by llguidance; for the helper and for the engine.

A matcher cannot cross processes, so whatever is tried in the helper is compiled again in the
engine. Both see a vocabulary as byte pieces, which is all that llguidance needs of it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

KINDS = ("json_schema", "regex", "grammar")
"""A JSON schema as text, a regular expression (Rust's syntax), a grammar (llguidance's Lark)."""


_JSON: JsonCompileOptions = {"whitespace_flexible": False}
"""No space between the parts of JSON, as programs write it. Where any may stand there, a small
model goes on with spaces and line ends until it is cut off; a schema that wants them says so
(``"x-guidance": {"whitespace_flexible": true}``)."""


class GrammarError(Exception):
    """A grammar is invalid, or needs more than it may; ``E_GRAMMAR`` on the wire."""


class _Pieces:
    """What `TokenizerWrapper` asks of a tokeniser."""

    bos_token_id = None

    def __init__(self, pieces: Sequence[bytes], eog: Sequence[int]) -> None:
        self.eos_token_id = min(eog)
        self.special_token_ids = [i for i, piece in enumerate(pieces) if not piece]
        self.tokens = [piece or b"<|%d|>" % i for i, piece in enumerate(pieces)]
        self._ids = {piece: i for i, piece in reversed(list(enumerate(pieces))) if piece}
        lengths: list[set[int]] = [set() for _ in range(256)]
        for piece in self._ids:
            lengths[piece[0]].add(len(piece))
        self._lengths = [sorted(some, reverse=True) for some in lengths]
        """Of the pieces that begin with each byte, the longest first: a mask is asked for while a
        device waits, and most bytes begin pieces of few lengths."""

    def __call__(self, text: bytes) -> list[int]:
        """Ids of a text that a grammar leaves no choice about: the longest piece each time."""
        ids: list[int] = []
        at = 0
        while at < len(text):
            for length in self._lengths[text[at]]:
                token = self._ids.get(text[at : at + length])
                if token is not None and at + length <= len(text):
                    ids.append(token)
                    at += length
                    break
            else:
                break  # no piece for this byte: what was found so far is a hint, too
        return ids


def make_tokenizer(
    lengths: array[int], pieces: bytes, vocab_size: int, eog: Sequence[int]
) -> LLTokenizer:
    """The vocabulary for `compile_grammar`; 0.1 s for 49,152 pieces.

    Args:
        lengths: Bytes of each piece by token id; 0 for special tokens.
        pieces: All pieces, one after the other.
        vocab_size: Logits per row; ids without a piece are never drawn.
        eog: Ids that end a generation.

    Raises:
        GrammarError: The model has no end token.
    """
    if not eog:
        raise GrammarError("the model has no end token, so constrained output could not end")
    table: list[bytes] = []
    at = 0
    for length in lengths[:vocab_size]:
        table.append(pieces[at : at + length])
        at += length
    table += [b""] * (vocab_size - len(table))
    for token in eog:
        table[token] = b""
    wrapper = TokenizerWrapper(_Pieces(table, eog))
    return LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=list(eog))


def compile_grammar(tokenizer: LLTokenizer, kind: str, text: str) -> LLMatcher:
    """A matcher that has seen nothing yet, whose first mask was computed.

    Raises:
        GrammarError: See there. The message is llguidance's, cut to 300 characters.
    """
    assert kind in KINDS
    try:
        if kind == "json_schema":
            schema = "{}" if text.strip() == "true" else text  # options need an object
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults=_JSON)
        elif kind == "regex":
            grammar = LLMatcher.grammar_from_regex(text)
        else:
            grammar = LLMatcher.grammar_from_lark(text)
    except ValueError as error:
        raise GrammarError(str(error)[:300]) from error
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise GrammarError(matcher.get_error().split("<state>")[0].strip()[:300])
    return matcher
