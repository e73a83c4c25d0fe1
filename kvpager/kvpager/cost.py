"""What it costs to preempt a sequence by swapping, and by recomputing: measured, not assumed."""

from __future__ import annotations

from kvpager.types import Tier

_WEIGHT = 0.2


class CostModel:
    """Rates in tokens per second, as the caller measures them (`observe`)."""

    def __init__(self) -> None:
        self.prefill: float | None = None
        self.loads: dict[Tier, float] = {}
        self.stores: dict[Tier, float] = {}

    def observe(
        self,
        *,
        prefill_tokens_per_s: float | None = None,
        load_tokens_per_s: float | None = None,
        store_tokens_per_s: float | None = None,
        tier: Tier = Tier.RAM,
    ) -> None:
        """Take in measurements, each smoothed exponentially (weight 0.2).

        Args:
            prefill_tokens_per_s: Of prompts.
            load_tokens_per_s: From ``tier`` into the first tier.
            store_tokens_per_s: From the first tier to ``tier``.
            tier: A lower tier.

        Raises:
            ValueError: A rate is not positive, or the tier is the first.
        """
        rates = (prefill_tokens_per_s, load_tokens_per_s, store_tokens_per_s)
        if any(rate is not None and not rate > 0 for rate in rates) or tier is Tier.GPU:
            raise ValueError(f"rates must be positive and of a lower tier, not {rates} of {tier}")
        if prefill_tokens_per_s is not None:
            self.prefill = _smooth(self.prefill, prefill_tokens_per_s)
        if load_tokens_per_s is not None:
            self.loads[tier] = _smooth(self.loads.get(tier), load_tokens_per_s)
        if store_tokens_per_s is not None:
            self.stores[tier] = _smooth(self.stores.get(tier), store_tokens_per_s)

    def rates(self) -> dict[str, float]:
        """Every rate that is known, by name."""
        found = {} if self.prefill is None else {"prefill": self.prefill}
        for name, rates in (("load", self.loads), ("store", self.stores)):
            found |= {f"{tier.name.lower()}_{name}": rate for tier, rate in rates.items()}
        return found

    @property
    def load(self) -> float | None:
        """Of the fastest tier that has been measured."""
        return next((self.loads[tier] for tier in sorted(self.loads)), None)

    @property
    def store(self) -> float | None:
        """Of the fastest tier that has been measured."""
        return next((self.stores[tier] for tier in sorted(self.stores)), None)

    def swap_is_cheaper(self, computed: int, to_store: int, found_again: int) -> bool:
        """Whether swapping costs less time than recomputing; so it is taken until rates are known.

        Args:
            computed: Tokens of the sequence.
            to_store: Of these, tokens whose pages are not in the lower tier yet.
            found_again: Tokens that would be found resident anyway if the sequence were dropped.
        """
        prefill, load, store = self.prefill, self.load, self.store
        if prefill is None or load is None or store is None:
            return True
        swap = to_store / store + computed / load
        recompute = (computed - found_again) / prefill + found_again / load
        return swap <= recompute

    def price(self, lost: int, to_store: int, *, swappable: bool) -> float | None:
        """Seconds that it costs to take ``lost`` tokens off the first tier and have them again.

        The cheaper of swap and recompute; None until the rates are known.

        Args:
            lost: Tokens in the blocks that become free.
            to_store: Of these, tokens whose pages are not in a lower tier yet.
            swappable: Whether there is a lower tier.
        """
        prefill, load, store = self.prefill, self.load, self.store
        if prefill is None:
            return None
        if not swappable:
            return lost / prefill
        if load is None or store is None:
            return None
        return min(to_store / store + lost / load, lost / prefill)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else (1 - _WEIGHT) * old + _WEIGHT * new
