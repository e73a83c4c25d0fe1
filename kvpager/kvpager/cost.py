"""What it costs to preempt a sequence by swapping, and by recomputing: measured, not assumed."""

from __future__ import annotations

_WEIGHT = 0.2


class CostModel:
    """Rates in tokens per second, as the caller measures them (`observe`)."""

    def __init__(self) -> None:
        self.prefill: float | None = None
        self.load: float | None = None
        self.store: float | None = None

    def observe(
        self,
        *,
        prefill_tokens_per_s: float | None = None,
        load_tokens_per_s: float | None = None,
        store_tokens_per_s: float | None = None,
    ) -> None:
        """Take in measurements, each smoothed exponentially (weight 0.2).

        Raises:
            ValueError: A rate is not positive.
        """
        rates = (prefill_tokens_per_s, load_tokens_per_s, store_tokens_per_s)
        if any(rate is not None and not rate > 0 for rate in rates):
            raise ValueError(f"rates must be positive, not {rates}")
        self.prefill = _smooth(self.prefill, prefill_tokens_per_s)
        self.load = _smooth(self.load, load_tokens_per_s)
        self.store = _smooth(self.store, store_tokens_per_s)

    def swap_is_cheaper(self, computed: int, to_store: int, found_again: int) -> bool:
        """Whether swapping costs less time than recomputing; so it is taken until rates are known.

        Args:
            computed: Tokens of the sequence.
            to_store: Of these, tokens whose pages are not in the lower tier yet.
            found_again: Tokens that would be found resident anyway if the sequence were dropped.
        """
        if self.prefill is None or self.load is None or self.store is None:
            return True
        swap = to_store / self.store + computed / self.load
        recompute = (computed - found_again) / self.prefill + found_again / self.load
        return swap <= recompute


def _smooth(old: float | None, new: float | None) -> float | None:
    if new is None or old is None:
        return old if new is None else new
    return (1 - _WEIGHT) * old + _WEIGHT * new
