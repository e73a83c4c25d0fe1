"""What shall go wrong in the simulated backend."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Faults:
    """What shall go wrong. Steps and transfers are counted from 0; may be changed at any time."""

    steps: set[int] = field(default_factory=set)
    """Steps that fail, leaving rubbish in every cell they were to write."""
    transfers: set[int] = field(default_factory=set)
    """Transfers that fail, leaving rubbish where they were to write."""
    nan_sequences: set[int] = field(default_factory=set)
    """Sequences whose logits are NaN."""
    hang_at_step: int = -1
    """The step that never ends."""
    most_runs: int = 0
    """Runs of a step that there is memory for; 0: any number."""
    delay_polls: int = 0
    """Calls of ``poll_transfers`` that a transfer outlasts."""
