"""Sequences that compute their front while their back is loaded: the pager carries the plan out."""

from __future__ import annotations

import pytest

from kvpager import (
    Admitted,
    DeferReason,
    Free,
    ImpossibleEventError,
    Instruction,
    Load,
    Preempt,
    Preempted,
    PreemptMode,
    Reserve,
    Reserved,
    Resume,
    Runnable,
    Shortage,
    StepLaunched,
    StepRetired,
    Store,
    Tier,
    TransferDone,
    TransferFailed,
    Truncate,
)
from tests.support.pager_caller import SIZE, Caller, ids

TEXT = ids(12 * SIZE + 1)


def flood(caller: Caller, blocks: int) -> None:
    """Somebody needs the whole pool of so many blocks and one more, and leaves nothing behind."""
    caller.prompt(2, ids(blocks * SIZE, 5000))
    caller.compute(2, ids(1, 9000))
    caller(Free(2, cache=False))


def swapped_out(*, compute: float = 100.0, load: float = 100.0, keep: bool = True) -> Caller:
    """Sequence 1 has computed twelve blocks and a token, all of which are in RAM alone."""
    caller = Caller(gpu=16, ram=40, keep=keep)
    caller.prompt(1, TEXT)
    caller(Preempt(1, PreemptMode.SWAP))
    caller.settle()
    flood(caller, 15)
    caller.settle()
    caller.pager.observe(
        prefill_tokens_per_s=compute, load_tokens_per_s=load, store_tokens_per_s=load
    )
    return caller


def loads(out: list[Instruction]) -> list[list[int]]:
    return [[page.index for page in item.pages] for item in out if isinstance(item, Load)]


def compute(caller: Caller, start: int, stop: int) -> list[Instruction]:
    return caller.compute(1, TEXT[start:stop])


def test_the_front_is_granted_while_the_back_is_loaded_from_its_end() -> None:
    caller = swapped_out()
    out = caller(Resume(1))
    # At equal rates half of the blocks each, half of that for now.
    assert out[-1] == Admitted(1, 0, False, 3 * SIZE)
    assert loads(out) == [[9, 10, 11], [7, 8]]
    # More than was granted is not to be had, and would be wrong to launch.
    refused = caller(Reserve((1,), (3 * SIZE + 1,)))
    assert refused == [Reserved((Shortage(1, 1, DeferReason.TRANSFER),))]
    with pytest.raises(ImpossibleEventError):
        caller(StepLaunched(99, (1,), (3 * SIZE + 1,)))


def test_it_jumps_over_what_has_been_loaded_and_goes_on_behind_it() -> None:
    caller = swapped_out()
    caller(Resume(1))
    until, position = 3 * SIZE, 0
    while until >= 0:
        out = compute(caller, position, until)
        while not any(isinstance(item, Runnable) for item in out):
            out += caller(TransferDone(caller.transfers.pop(0)))
        (runnable,) = [item for item in out if isinstance(item, Runnable)]
        position, until = runnable.computed, runnable.until
    assert position == 12 * SIZE
    assert caller.pager.computed(1) == 12 * SIZE
    assert caller.pager.stats().loaded_pages >= 4
    compute(caller, position, len(TEXT))
    caller.settle()
    assert caller.pager.stats().restores == 1


def test_a_block_that_cannot_be_loaded_is_computed_and_none_is_done_twice() -> None:
    caller = swapped_out()
    out = caller(Resume(1))
    asked = {item.transfer: item for item in out if isinstance(item, Load)}
    bad = next(iter(asked.values()))
    lost = {page.index for page in bad.pages}
    computed: set[int] = set()
    loaded: set[int] = set()
    position, until = 0, out[-1].until  # type: ignore[union-attr]
    while until >= 0:
        if position < until:
            computed |= set(range(position // SIZE, until // SIZE))
            out = compute(caller, position, until)
            position = until
        else:
            transfer = caller.transfers.pop(0)
            if transfer == bad.transfer:
                out = caller(TransferFailed(transfer))
            else:
                loaded |= {page.index for page in asked[transfer].pages}
                out = caller(TransferDone(transfer))
        asked |= {item.transfer: item for item in out if isinstance(item, Load)}
        for item in out:
            if isinstance(item, Runnable):
                position, until = item.computed, item.until
    assert lost <= computed
    assert not computed & loaded
    assert computed | loaded == set(range(12))
    assert len(loaded) >= 2


def test_both_together_take_n_over_the_sum_of_their_rates() -> None:
    """One device and one link, a second for each block that either of them does."""
    blocks = 240
    text = ids(blocks * SIZE + 1)
    caller = Caller(gpu=blocks + 4, ram=2 * blocks)
    caller.validate = False
    caller.prompt(1, text)
    caller(Preempt(1, PreemptMode.SWAP))
    caller.settle()
    flood(caller, blocks + 3)
    caller.settle()
    caller.pager.observe(prefill_tokens_per_s=SIZE, load_tokens_per_s=SIZE, store_tokens_per_s=SIZE)
    now = link_free = device_free = 0.0
    position = until = 0
    link: list[tuple[float, int]] = []

    def take(out: list[Instruction]) -> None:
        nonlocal link_free, position, until
        for item in out:
            if isinstance(item, Load):
                link_free = max(link_free, now) + len(item.pages)
                link.append((link_free, item.transfer))
            elif isinstance(item, (Admitted, Runnable)):
                position, until = item.computed, item.until

    take(caller(Resume(1)))
    while until >= 0:
        if position < until:
            device_free = now + 2
            epoch = caller.launch(1, 2 * SIZE if until - position >= 2 * SIZE else SIZE)
            step = text[position : caller.pager.length(1)]
            while link and link[0][0] <= device_free:
                now, transfer = link.pop(0)
                take(caller(TransferDone(transfer)))
            now = device_free
            position += len(step)
            take(caller(StepRetired(epoch, (step,))))
        else:
            now, transfer = link.pop(0)
            take(caller(TransferDone(transfer)))
    best = blocks / 2
    assert best <= now <= 1.15 * best, now


@pytest.mark.parametrize("ending", ["preempt", "truncate", "free"])
def test_whatever_ends_it_keeps_the_front_and_gives_everything_else_back(ending: str) -> None:
    caller = swapped_out()
    caller(Resume(1))
    compute(caller, 0, 2 * SIZE)
    if ending == "preempt":
        out = caller(Preempt(1, PreemptMode.SWAP))
        assert isinstance(out[-1], Preempted)
        caller.settle()
        out = caller(Resume(1))
        # What had been loaded, or still was, is found again.
        assert caller.pager.computed(1) >= 2 * SIZE
        caller.settle()
    elif ending == "truncate":
        caller(Truncate(1, SIZE + 1))
        caller.compute(1, TEXT[SIZE + 1 : 5 * SIZE])
        assert caller.pager.computed(1) == 5 * SIZE
    if ending != "preempt":
        caller(Free(1))
        caller.settle()
        stats = caller.pager.stats()
        assert (stats.gpu.used, stats.ram.used) == (0, 0)


def test_another_may_share_what_is_being_loaded_behind_the_front() -> None:
    caller = swapped_out()
    first = caller(Resume(1))
    caller(TransferDone(next(item.transfer for item in first if isinstance(item, Load))))
    caller.transfers.pop(0)
    caller(Preempt(1, PreemptMode.RECOMPUTE))
    caller.settle()
    (verdict,) = [item for item in caller.admit(3, TEXT) if isinstance(item, Admitted)]
    caller.settle()
    assert verdict.until >= 0 or caller.pager.computed(3) == 12 * SIZE


@pytest.mark.parametrize(
    ("compute_rate", "load_rate"), [(1.0, 1000.0), (None, 100.0)], ids=["slow device", "unknown"]
)
def test_where_loading_is_faster_or_nothing_was_measured_it_just_loads(
    compute_rate: float | None, load_rate: float
) -> None:
    caller = Caller(gpu=16, ram=40)
    caller.prompt(1, TEXT)
    caller(Preempt(1, PreemptMode.SWAP))
    caller.settle()
    flood(caller, 15)
    caller.pager.observe(prefill_tokens_per_s=compute_rate, load_tokens_per_s=load_rate)
    out = caller(Resume(1))
    assert out[-1] == Admitted(1, len(TEXT), True)
    assert loads(out) == [list(range(13))]


def test_where_cells_belong_to_sequences_it_just_loads() -> None:
    out = swapped_out(keep=False)(Resume(1))
    assert out[-1] == Admitted(1, len(TEXT), True)


def test_a_slow_disk_is_helped_by_computing_though_ram_is_not() -> None:
    caller = Caller(gpu=16, ram=2, disk=40)
    caller.prompt(1, TEXT)
    out = caller(Preempt(1, PreemptMode.SWAP))
    assert {item.tier for item in out if isinstance(item, Store)} == {Tier.RAM, Tier.DISK}
    caller.settle()
    flood(caller, 15)
    caller.settle()
    caller.pager.observe(prefill_tokens_per_s=100.0, load_tokens_per_s=1e6)
    caller.pager.observe(load_tokens_per_s=150.0, tier=Tier.DISK)
    out = caller(Resume(1))
    assert out[-1].until > 0  # type: ignore[union-attr]
