"""Which parts of a rendered conversation the client wrote.

Strings of the client are wrapped in marks before rendering: sequences of private-use characters
drawn at random for each request (128 bits), which nobody can have written. After rendering the
marks say where each string came to lie, whatever the template did around it.

A mark lies around the core of a string, not its outer white space, because nearly every template
trims. A further mark is put *inside* every spelling of a special token within a string, so that
such a spelling is cut in two wherever the template carries it, even one that takes strings apart.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

_PRIVATE_USE = 0xF0000
"""First of the 65,534 characters of Supplementary Private Use Area-A."""

_BEGIN, _END, _INNER = _KINDS = "\U0010fffb\U0010fffc\U0010fffd"
"""What a mark says: its last character, after a prefix that is random for each request."""

_STRUCTURE = frozenset({"role", "type"})
"""Keys whose values a template compares and does not show: marked only where they are suspect."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation without its marks."""

    text: str
    parts: tuple[tuple[bool, str], ...]
    """The text in order: ``(written by the client, part)``. Neighbours differ, unless the template
    took strings apart: then ``whole`` is false, and the parts are all that lies between marks."""
    cuts: tuple[int, ...]
    """Bytes of the UTF-8 text at which a mark lay, ascending: no special token of the template can
    reach across one."""
    whole: bool

    @classmethod
    def plain(cls, text: str) -> Rendered:
        """A text nothing is known about."""
        return cls(text, ((False, text),), (), True)

    def after(self, known: str) -> Rendered:
        """What follows ``known``, with which the text must begin."""
        skip = len(known)
        parts = []
        for client, part in self.parts:
            if skip < len(part):
                parts.append((client, part[skip:]))
            skip = max(skip - len(part), 0)
        start = len(known.encode())
        cuts = tuple(cut - start for cut in self.cuts if cut > start)
        return Rendered(self.text[len(known) :], tuple(parts), cuts, self.whole)


class SpecialText:
    """Finds spellings of special tokens."""

    def __init__(self, spellings: Iterable[str]) -> None:
        texts = sorted({s for s in spellings if s}, key=len, reverse=True)
        self._single = frozenset(s for s in texts if len(s) == 1)
        self._firsts = frozenset(s[0] for s in texts)
        # Looking ahead finds spellings that overlap each other too.
        self._pattern = re.compile("(?=(?:" + "|".join(map(re.escape, texts)) + "))")

    def __contains__(self, text: str) -> bool:
        return bool(self._starts(text))

    def _starts(self, text: str) -> list[int]:
        if self._firsts.isdisjoint(text):
            return []
        return [match.start() for match in self._pattern.finditer(text)]

    def has_single(self, text: str) -> bool:
        """Whether a special token spelt with one character occurs: nothing can cut that."""
        return not self._single.isdisjoint(text)

    def cut(self, text: str, mark: str) -> str:
        """``text`` with ``mark`` after the first character of every spelling."""
        starts = self._starts(text)
        if not starts:
            return text
        edges = [0, *(start + 1 for start in starts), len(text)]
        return mark.join(text[a:b] for a, b in pairwise(edges))


class Marker:
    """Marks the strings of one request, and reads the marks in its render."""

    def __init__(self, special: SpecialText) -> None:
        self._special = special
        self._prefix = "".join(chr(_PRIVATE_USE + secrets.randbelow(65_534)) for _ in range(8))
        self._begin, self._end, self._inner = (self._prefix + kind for kind in _KINDS)

    def mark(self, value: Any, *, everything: bool, key: str = "") -> Any:
        """A copy of ``value`` in which strings are marked.

        Args:
            value: Maps, lists and scalars.
            everything: All strings but those of `_STRUCTURE`; else only ``content`` and ``text``.
            key: Of the map the value stands in.
        """
        if isinstance(value, str):
            wanted = key not in _STRUCTURE if everything else key in ("content", "text")
            return self._wrap(value) if wanted or value in self._special else value
        if isinstance(value, dict):
            return {
                self.mark(k, everything=False): self.mark(v, everything=everything, key=k)
                for k, v in value.items()
            }
        if isinstance(value, list):
            return [self.mark(v, everything=everything, key=key) for v in value]
        return value

    def _wrap(self, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        at = text.index(core)
        cut = self._special.cut(core, self._inner)
        return f"{text[:at]}{self._begin}{cut}{self._end}{text[at + len(core) :]}"

    def read(self, marked: str) -> Rendered:
        """The render without marks, and what they say.

        Where the template damaged a mark, what is left of it stays in the text.
        """
        first, *pieces = marked.split(self._prefix)
        texts = [first]
        kinds = []
        for piece in pieces:
            if piece[:1] in _KINDS and piece:
                kinds.append(piece[0])
                texts.append(piece[1:])
            else:
                texts[-1] += self._prefix + piece
        text = "".join(texts)
        sizes = map(len, texts) if text.isascii() else (len(part.encode()) for part in texts)
        cuts = tuple(accumulate(sizes))[:-1]
        parts = _by_author(texts, kinds)
        if parts is not None:
            return Rendered(text, parts, cuts, True)
        return Rendered(text, tuple((False, part) for part in texts if part), cuts, False)


def _by_author(texts: list[str], kinds: list[str]) -> tuple[tuple[bool, str], ...] | None:
    """The text in parts by author, or None where begin and end do not pair up."""
    inside, parts = False, [(False, [texts[0]])]
    for kind, text in zip(kinds, texts[1:], strict=True):
        if inside == (kind == _BEGIN):
            return None
        inside = kind != _END
        if parts[-1][0] == inside:
            parts[-1][1].append(text)
        elif text:
            parts.append((inside, [text]))
    if inside:
        return None
    joined = ((client, "".join(part)) for client, part in parts)
    return tuple((client, part) for client, part in joined if part)


def strings_of(value: Any, *, shown: bool = False) -> Iterator[str]:
    """Every string in maps and lists, in order.

    Args:
        value: Maps, lists and scalars.
        shown: Only those a template shows one after the other: no keys, nothing of `_STRUCTURE`.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if not shown:
                yield from strings_of(key)
            if not shown or key not in _STRUCTURE:
                yield from strings_of(item, shown=shown)
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item, shown=shown)
