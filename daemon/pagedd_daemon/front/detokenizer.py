"""Token ids to text, as a stream: whole characters only, and never a stop string.

The front knows a vocabulary only as a table of byte pieces. That is enough for byte-level BPE,
byte-fallback SentencePiece and vocabularies that write a space as ``▁`` alike, because the helper
makes the table with the model's own rules; control tokens stand for nothing.
"""

from __future__ import annotations

import codecs
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

_INT32 = "i"
_UINT32 = "I"


def unpack_ids(packed: bytes) -> array[int]:
    """Token ids from packed little-endian int32.

    Raises:
        ValueError: The length is no multiple of 4.
    """
    ids = array(_INT32)
    ids.frombytes(packed)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids as packed little-endian int32."""
    # Of a bytes object, array would take four for one id.
    packed = array(_INT32, ids if isinstance(ids, array) else iter(ids))
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


class PieceTable:
    """For each token id the bytes it stands for: one string of bytes and an array of offsets.

    49,152 pieces take 0.5 MB this way, and 3.5 MB as objects.
    """

    __slots__ = ("_blob", "_offsets", "space_prefix")

    def __init__(self, lengths: Iterable[int], blob: bytes, *, space_prefix: bool = False) -> None:
        """A table of pieces that lie in ``blob`` one after the other.

        Args:
            lengths: Bytes of each piece, by token id.
            blob: All pieces.
            space_prefix: The tokeniser puts a space in front of a text, which `decode` takes away.

        Raises:
            ValueError: The lengths do not add up to the blob.
        """
        self._offsets = array(_UINT32, accumulate(lengths, initial=0))
        self._blob = blob
        self.space_prefix = space_prefix
        if self._offsets[-1] != len(blob):
            raise ValueError(f"pieces of {self._offsets[-1]} bytes in a blob of {len(blob)}")

    @classmethod
    def from_wire(cls, lengths: bytes, blob: bytes, *, space_prefix: bool = False) -> PieceTable:
        """The table from packed lengths (int32) and pieces, as the helper sends them."""
        return cls(unpack_ids(lengths), blob, space_prefix=space_prefix)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def lengths(self) -> bytes:
        """Bytes of each piece by token id, as packed int32."""
        ends = self._offsets
        return pack_ids(end - start for start, end in pairwise(ends))

    @property
    def blob(self) -> bytes:
        """All pieces, one after the other."""
        return self._blob

    def __getitem__(self, token: int) -> bytes:
        """The bytes of a token.

        Raises:
            IndexError: The id is outside the vocabulary.
        """
        if token < 0:
            raise IndexError(f"token id {token} is negative")
        return self._blob[self._offsets[token] : self._offsets[token + 1]]

    def join(self, tokens: Iterable[int]) -> bytes:
        """The bytes of many tokens."""
        return b"".join(map(self.__getitem__, tokens))

    def decode(self, tokens: Iterable[int]) -> str:
        """A whole text, not the continuation of one; bytes that are not UTF-8 become U+FFFD."""
        data = self.join(tokens)
        if self.space_prefix and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")


class _StopAutomaton:
    """Finds several strings at once, a character at a time (Aho and Corasick, CACM 18(6), 1975)."""

    __slots__ = ("_fail", "_next", "depth", "first", "longest")

    def __init__(self, strings: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self.depth = [0]
        """Of each state: characters that may be the start of a string."""
        self.longest = [0]
        """Of each state: length of the longest string that ends here; 0 for none."""
        for string in strings:
            state = 0
            for char in string:
                state = self._child(state, char)
            self.longest[state] = len(string)
        self._fail = [0] * len(self._next)
        queue = list(self._next[0].values())
        for state in queue:  # breadth first: a state's failure state is shallower, so it is done
            for char, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], char)
                self.longest[child] = max(self.longest[child], self.longest[self._fail[child]])
                queue.append(child)
        self.first = frozenset(self._next[0])

    def _child(self, state: int, char: str) -> int:
        child = self._next[state].get(char)
        if child is None:
            child = len(self._next)
            self._next[state][char] = child
            self._next.append({})
            self.depth.append(self.depth[state] + 1)
            self.longest.append(0)
        return child

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)


@lru_cache(maxsize=64)
def _automaton(strings: tuple[str, ...]) -> _StopAutomaton:
    return _StopAutomaton(strings)


class Detokenizer:
    """The text of one sample, as its tokens come.

    Bytes that may be the beginning of a character, and characters that may be the beginning of a
    stop string, are held back. The text ends before the stop string that is complete first (of
    several that are complete with the same character, the longest), so the result does not depend
    on how the tokens were grouped. A sample continues a prompt, so its first token keeps its space.

    Each character is looked at a constant number of times, however tokens are pushed.

    Args:
        table: The vocabulary.
        stop: Strings that end the text; empty ones never do.
        after: Tokens in whose text no stop string is looked for (``min_tokens`` of a request).

    Attributes:
        stopped: A stop string was found; nothing that is pushed afterwards counts.
        stop: That string; None before.
        kept_tokens: Of the tokens pushed, how many belong to the text: all of them, or, when
            stopped, those whose first byte lies before the first byte of the stop string (a token
            without text goes with the one before or after it).
    """

    __slots__ = (
        "_after",
        "_chars",
        "_decoder",
        "_held",
        "_starts",
        "_state",
        "_stops",
        "_table",
        "kept_tokens",
        "stop",
        "stopped",
    )

    def __init__(self, table: PieceTable, stop: Sequence[str] = (), after: int = 0) -> None:
        self._table = table
        self._after = after
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        strings = tuple(s for s in stop if s)
        self._stops = _automaton(strings) if strings else None
        self._state = 0
        self._held = ""
        self._chars = 0  # characters decoded so far, but those of the first tokens
        # For each token that may still be cut off, the index of the character its first byte
        # belongs to, or comes after if that character began with an earlier token.
        self._starts: list[int] = []
        self.stopped = False
        self.stop: str | None = None
        self.kept_tokens = 0

    def push(self, tokens: Sequence[int]) -> str:
        """Take the next tokens.

        Returns:
            The text that is now safe to show.

        Raises:
            IndexError: A token id is outside the vocabulary.
        """
        if self.stopped:
            return ""
        if self._stops is None:
            self.kept_tokens += len(tokens)
            return self._decoder.decode(self._table.join(tokens))
        shown = []
        if (exempt := self._after - self.kept_tokens) > 0:
            first, tokens = tokens[:exempt], tokens[exempt:]
            self.kept_tokens += len(first)
            shown.append(self._decoder.decode(self._table.join(first)))
        shown += [self._token(self._stops, token) for token in tokens]
        # A token before the held characters can no longer be cut off.
        del self._starts[: bisect_left(self._starts, self._chars - len(self._held))]
        return "".join(shown)

    def finish(self) -> str:
        """End the sample: the rest of its text, bytes of a broken character as U+FFFD."""
        if self.stopped:
            return ""
        last = self._decoder.decode(b"", final=True)
        if self._stops is None:
            return last
        shown = self._scan(self._stops, last)
        held, self._held = self._held, ""
        return shown + held

    def _token(self, stops: _StopAutomaton, token: int) -> str:
        """Decode and search one token; what may be shown of it and of what was held."""
        if self.stopped:
            return ""
        piece = self._table[token]
        self.kept_tokens += 1
        start = self._chars
        text = ""
        if piece and self._decoder.getstate()[0]:
            # A character is incomplete. Either this token's first byte goes on with it, or that
            # character is broken, decoded as one U+FFFD, and the token begins the one after it.
            text = self._decoder.decode(piece[:1])
            if len(text) == 2 or (text and self._decoder.getstate()[0]):
                start += 1
            piece = piece[1:]
        self._starts.append(start)
        return self._scan(stops, text + self._decoder.decode(piece))

    def _scan(self, stops: _StopAutomaton, text: str) -> str:
        """Move the search on by ``text``, which joins what is held; what may be shown."""
        if not self._state and stops.first.isdisjoint(text):
            self._chars += len(text)
            return text
        state, depth, longest = self._state, stops.depth, stops.longest
        whole = self._held + text
        for index, char in enumerate(text, len(self._held) + 1):
            state = stops.step(state, char)
            if longest[state]:
                self.stop = whole[index - longest[state] : index]
                return self._stop_at(whole, index - longest[state])
        self._state = state
        self._chars += len(text)
        cut = len(whole) - depth[state]
        self._held = whole[cut:]
        return whole[:cut]

    def _stop_at(self, whole: str, cut: int) -> str:
        """The text ends at ``whole[cut]``."""
        first = self._chars - len(self._held) + cut
        self.kept_tokens -= len(self._starts) - bisect_left(self._starts, first)
        self.stopped = True
        self._held = ""
        return whole[:cut]
