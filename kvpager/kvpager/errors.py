"""What the pager raises. Both carry the story of the sequence, and leave the state unchanged."""

from __future__ import annotations


class PagerError(Exception):
    """Base of the pager's errors.

    Attributes:
        story: The last events of the sequence concerned, oldest first.
    """

    def __init__(self, message: str, story: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.story = story

    def __str__(self) -> str:
        text = super().__str__()
        return text if not self.story else text + "\n  " + "\n  ".join(self.story)


class ImpossibleEventError(PagerError):
    """An event that cannot follow what came before: the caller's bug (extend after free, a transfer
    completed twice, an unknown sequence)."""


class InvariantError(PagerError):
    """``validate()`` found a contradiction: the pager's own bug."""
