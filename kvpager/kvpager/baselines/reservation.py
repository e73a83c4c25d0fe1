"""How much memory a request is given before its length is known (paper, section 6.1)."""

from __future__ import annotations

from typing import Protocol


class Reservation(Protocol):
    """Slots to reserve for one sequence."""

    def __call__(self, prompt: int, output: int, limit: int) -> int:
        """For ``prompt`` tokens that ``output`` more will truly follow, at most ``limit`` slots."""
        ...


def longest(prompt: int, output: int, limit: int) -> int:
    """Orca (Max): the longest the model allows. Knows nothing."""
    return limit


def next_power_of_two(prompt: int, output: int, limit: int) -> int:
    """Orca (Pow2): at most twice the output, as if its length were roughly known: 25 reserve 32."""
    return min(prompt + (1 << max(output - 1, 0).bit_length()), limit)


def exact(prompt: int, output: int, limit: int) -> int:
    """Orca (Oracle): exactly what will be used, which no real system can know."""
    return min(prompt + output, limit)
