"""The machine that is simulated: how big its memory is and how long things take on it.

Fixed before any policy was run and the same for every policy. `docs/paper.md` states where each
number comes from and what changes when it is 30 % off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

TOKEN_BYTES = 819_200
"""KV of one token of OPT-13B: 2 x 40 layers x 5,120 x 2 bytes, the paper's 800 KB (section 3)."""
POOL_SLOTS = 12 * 2**30 // TOKEN_BYTES
"""12 GB of KV (table 1): 15,728 tokens, the paper's 15.7K slots."""
BLOCK_TOKENS = 16
LONGEST = 2048
"""Tokens of the longest sequence of OPT."""
RAM_SLOTS = 4 * POOL_SLOTS
"""CPU swap space, in tokens: 48 GiB, never the limit here."""
LAYERS = 40


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Seconds of a step and of a transfer.

    ``step_s + sequence_s`` per sequence of the step ``+ prefill_s`` per prompt token in it.
    """

    step_s: float = 33e-3
    sequence_s: float = 0.3e-3
    prefill_s: float = 0.14e-3
    pcie_bytes_per_s: float = 25e9
    copy_s: float = 6.6e-6
    """The least an asynchronous copy costs: submitting it."""

    def step(self, sequences: int, prefill_tokens: int) -> float:
        """One step of ``sequences`` sequences that computes ``prefill_tokens`` of prompts."""
        return self.step_s + self.sequence_s * sequences + self.prefill_s * prefill_tokens

    def transfer(self, tokens: int, copies: int) -> float:
        """Moving the KV of ``tokens`` tokens over PCIe in ``copies`` equal copies."""
        moved = tokens * TOKEN_BYTES / self.pcie_bytes_per_s
        return max(moved, self.copy_s * copies)

    def changed(self, coefficient: str, factor: float) -> LatencyModel:
        """This model with one coefficient (a field's name) multiplied."""
        return replace(self, **{coefficient: getattr(self, coefficient) * factor})
