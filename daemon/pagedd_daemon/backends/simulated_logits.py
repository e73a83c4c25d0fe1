"""What the simulated backend would like to say next: most of it valid UTF-8, some of it the end."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedd_daemon.backends.chain import mix, noise

_EOG_EVERY = 256
"""One in so many positions wants to end the text."""
_MULTIBYTE_EVERY = 24
"""One in so many characters is not ASCII."""

# What must follow a byte, so that most text is valid UTF-8: é, €, 😀.
_FOLLOWS = {0xC3: 0xA9, 0xE2: 0x82, 0x82: 0xAC, 0xF0: 0x9F, 0x9F: 0x98, 0x98: 0x80}
_LEADS = (0xC3, 0xE2, 0xF0)


class Logits:
    """Rows of logits that depend on a hash of all that is in front of them."""

    def __init__(self, vocab_size: int, eog_tokens: frozenset[int]) -> None:
        """For a vocabulary of which ``eog_tokens`` end a text."""
        self._vocab_size = vocab_size
        self._eog_tokens = eog_tokens
        self._noise = noise(1 << 16, vocab_size)

    def fill(self, row: npt.NDArray[np.float32], h: int, before: int) -> None:
        """The logits of a position: noise and three favourites, all by hash of the content.

        Args:
            row: float32, shape ``(vocab,)``, overwritten.
            h: The hash.
            before: The last token of the text.
        """
        offset = h & 0xFFFF
        row[:] = self._noise[offset : offset + row.size]
        follower = _FOLLOWS.get(before)
        if follower is not None and row.size >= 256:
            row[follower] = 25.0
        else:
            for height in (11.0, 9.5, 9.0):
                h = mix(h)
                # An id that text of this vocabulary might have here.
                if self._vocab_size < 256:
                    row[h % self._vocab_size] = height
                elif h % _MULTIBYTE_EVERY == 0:
                    row[_LEADS[(h >> 8) % len(_LEADS)]] = height
                else:
                    row[32 + (h >> 8) % 95] = height
        eog = self._eog_tokens
        for token in eog:
            row[token] = -20.0
        if eog and follower is None and (h >> 32) % _EOG_EVERY == 0:
            row[min(eog)] = 30.0
