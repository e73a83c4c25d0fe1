"""What the pager promises, one promise a test."""

from __future__ import annotations

import numpy as np
import pytest

from kvpager import (
    Admit,
    Admitted,
    Attach,
    CopyBlock,
    DeferReason,
    Deferred,
    Denied,
    Fork,
    Free,
    ImpossibleEventError,
    Instruction,
    InvariantError,
    Load,
    Pager,
    PagerConfig,
    Preempt,
    Preempted,
    PreemptMode,
    PriorityClass,
    Release,
    Reserve,
    Reserved,
    Resume,
    Runnable,
    Shortage,
    Spill,
    StepFailed,
    StepLaunched,
    StepRetired,
    Store,
    Tier,
    TransferDone,
    TransferFailed,
    Trim,
    Truncate,
)
from tests.support.pager_caller import OTHER_ROOT, SIZE, Caller, ids

# ----------------------------------------------------------------------------------- sharing


def test_the_same_root_hits_what_is_active_and_the_last_token_is_computed() -> None:
    caller = Caller()
    caller.prompt(1, ids(12))
    first = caller.table(1)
    # All three blocks are full, yet the last one holds the token whose logits are wanted.
    assert caller.admit(2, ids(12)) == [Attach(2, 0, first[:2], 8), Admitted(2, 8, False)]


def test_the_same_root_hits_what_is_cached() -> None:
    caller = Caller()
    caller.prompt(1, ids(12))
    first = caller.table(1)
    assert caller(Free(1)) == [Release(1)]
    assert caller.pager.stats().gpu.cached == 3
    assert caller.admit(2, ids(13)) == [Attach(2, 0, first, 12), Admitted(2, 12, False)]


def test_another_root_never_hits() -> None:
    caller = Caller()
    caller.prompt(1, ids(12))
    assert caller.admit(2, ids(12), OTHER_ROOT) == [Admitted(2, 0, False)]
    caller(Free(1))
    assert caller.admit(3, ids(12), bytes([7] * 32)) == [Admitted(3, 0, False)]


def test_free_without_cache_leaves_nothing_to_hit() -> None:
    caller = Caller(ram=16)
    caller.prompt(1, ids(12))
    caller(Preempt(1, PreemptMode.SWAP))
    caller(TransferDone(1))
    caller(Resume(1))
    caller(Free(1, cache=False))
    assert caller.admit(2, ids(12)) == [Admitted(2, 0, False)]
    assert caller.pager.stats().ram.cached == 0


def test_free_without_cache_spares_what_others_had_cached() -> None:
    caller = Caller()
    caller.prompt(1, ids(8))
    caller(Free(1))
    caller.admit(2, ids(12))
    caller.compute(2, ids(4, 8))
    caller(Free(2, cache=False))
    assert caller.admit(3, ids(12))[-1] == Admitted(3, 8, False)


def test_a_prefix_being_computed_is_waited_for() -> None:
    caller = Caller()
    caller.admit(1, ids(12))
    (answer,) = caller.admit(2, ids(14))
    assert isinstance(answer, Deferred)
    assert answer.reason is DeferReason.PREFIX_IN_FLIGHT
    # Half of it is there: the other half is still worth waiting for.
    caller.compute(1, ids(8))
    (answer,) = caller.admit(2, ids(14))
    assert isinstance(answer, Deferred)
    caller.compute(1, ids(4, 8))
    assert caller.admit(2, ids(14))[-1] == Admitted(2, 12, False)


def test_nobody_waits_for_a_prefix_whose_computer_has_ended() -> None:
    caller = Caller()
    caller.admit(1, ids(12))
    caller(Free(1))
    assert caller.admit(2, ids(12)) == [Admitted(2, 0, False)]


def test_eight_requests_with_one_prefix_compute_it_once() -> None:
    caller = Caller(gpu=512)
    prefix = ids(1000)
    computed = 0
    prompts = {seq: np.concatenate((prefix, ids(32, 5000 + 100 * seq))) for seq in range(8)}
    waiting = dict(prompts)
    while waiting:
        running: list[tuple[int, int]] = []
        for seq, tokens in list(waiting.items()):
            answer = caller.admit(seq, tokens)[-1]
            if isinstance(answer, Admitted):
                del waiting[seq]
                running.append((seq, answer.computed))
        for seq, start in running:
            caller.compute(seq, prompts[seq][start:])
            computed += len(prompts[seq]) - start
    assert computed <= 1000 + 8 * 48


def test_two_computers_of_one_page_keep_a_copy_each() -> None:
    caller = Caller()
    caller.admit(1, ids(5))
    caller.admit(2, ids(5, 100))  # shares nothing, as far as anyone knows
    caller(Truncate(2, 0))
    caller.compute(1, ids(4))
    caller.compute(2, ids(4))  # computes the very same page
    assert caller.table(1)[0] != caller.table(2)[0]
    # The one that was found goes; the other takes its place when its sequence has ended.
    caller(Free(1, cache=False))
    caller(Free(2))
    assert caller.admit(3, ids(5))[-1] == Admitted(3, 4, False)


# --------------------------------------------------------------------------------- admission


def test_a_prompt_that_can_never_fit_is_denied_with_the_figures() -> None:
    caller = Caller(gpu=4)
    assert caller.admit(1, ids(16)) == [Denied(1, 5, 4)]
    assert caller.admit(1, ids(12)) == [Admitted(1, 0, False)]


def test_more_sequences_than_the_backend_can_name_are_denied() -> None:
    caller = Caller(max_sequences=4)
    assert caller.admit(1, ids(4), width=5) == [Denied(1, 5, 4)]


def test_admission_wants_the_whole_prompt_and_the_margin() -> None:
    caller = Caller(gpu=10, margin=0.2)
    caller.admit(1, ids(20))
    # 4 blocks and a margin of 2, and 5 are free.
    (answer,) = caller.admit(2, ids(16, 50))
    assert answer == Deferred(2, DeferReason.BLOCKS, 6, 5)
    assert caller.admit(3, ids(12, 50))[-1] == Admitted(3, 0, False)


def test_the_margin_is_waived_when_nothing_else_runs() -> None:
    caller = Caller(gpu=5, margin=0.5)
    assert caller.admit(1, ids(16)) == [Admitted(1, 0, False)]


def test_a_deferred_sequence_leaves_no_trace() -> None:
    caller = Caller(gpu=6)
    caller.admit(1, ids(16))
    before = caller.pager.stats()
    (answer,) = caller.admit(2, ids(16, 50))
    assert isinstance(answer, Deferred)
    assert caller.pager.stats() == before


def test_sequence_ids_are_counted_from_admission_to_release() -> None:
    caller = Caller(max_sequences=3)
    caller.prompt(1, ids(5), width=2)
    caller.prompt(2, ids(5, 50))
    (answer,) = caller.admit(3, ids(5, 90))
    assert answer == Deferred(3, DeferReason.SEQUENCES, 1, 0)
    caller(Fork(1, (11,)))  # out of the two it was admitted with
    with pytest.raises(ImpossibleEventError):
        caller(Fork(1, (12,)))
    caller(Free(11))
    assert caller.admit(3, ids(5, 90)) == [Admitted(3, 0, False)]
    caller(Preempt(2))
    assert caller.admit(4, ids(5, 130)) == [Admitted(4, 0, False)]
    assert caller(Resume(2)) == [Deferred(2, DeferReason.SEQUENCES, 1, 0)]


# ------------------------------------------------------------------------------------- steps


def test_reserve_serves_in_order_each_whole_or_not_at_all() -> None:
    caller = Caller(gpu=5)
    caller.prompt(1, ids(4))
    caller.prompt(2, ids(4, 50))
    # Three blocks are left: the first gets two, the second would need two.
    assert caller(Reserve((1, 2), (8, 5))) == [Reserved((Shortage(2, 1),))]
    assert caller.free == 1
    assert len(caller.table(2)) == 1


def test_a_reservation_may_be_asked_for_again() -> None:
    caller = Caller()
    caller.prompt(1, ids(4))
    caller(Reserve((1,), (4,)))
    before = caller.table(1)
    caller(Reserve((1,), (4,)))
    assert caller.table(1) == before


def test_two_steps_may_be_in_flight() -> None:
    caller = Caller()
    caller.prompt(1, ids(7))
    first, second = caller.launch(1, 1), caller.launch(1, 1)
    assert (caller.pager.computed(1), caller.pager.length(1)) == (7, 9)
    caller(StepRetired(first, (ids(1, 7),)))
    caller(StepRetired(second, (ids(1, 8),)))
    assert caller.pager.computed(1) == 9


def test_a_failed_step_takes_later_ones_that_built_on_it_along() -> None:
    caller = Caller()
    caller.prompt(1, ids(6))
    first, second = caller.launch(1, 1), caller.launch(1, 1)
    caller(StepFailed(first))
    assert caller.pager.length(1) == 6
    assert caller(StepRetired(second, (ids(1, 7),))) == [Trim(1, 6)]
    assert caller.pager.computed(1) == 6
    caller.compute(1, ids(2, 60))
    # What was computed at last is what is found.
    caller(Free(1))
    assert caller.admit(2, np.concatenate((ids(6), ids(3, 60))))[-1] == Admitted(2, 8, False)


def test_a_step_that_computes_other_tokens_than_the_prompt_is_refused() -> None:
    caller = Caller()
    caller.admit(1, ids(8))
    epoch = caller.launch(1, 8)
    with pytest.raises(ImpossibleEventError, match="other tokens than its prompt"):
        caller(StepRetired(epoch, (ids(8, 1),)))
    caller(StepRetired(epoch, (ids(8),)))


def test_truncated_blocks_are_not_handed_out_before_the_step_has_ended() -> None:
    caller = Caller(gpu=6)
    caller.prompt(1, ids(4))
    epoch = caller.launch(1, 12)
    mine = set(caller.table(1)[1:])
    assert caller(Truncate(1, 4)) == []
    (answer,) = caller.admit(2, ids(12, 50))
    assert answer == Deferred(2, DeferReason.BLOCKS, 3, 2)
    assert caller(StepRetired(epoch, (ids(12, 4),))) == [Trim(1, 4)]
    caller.admit(2, ids(12, 50))
    assert mine & set(caller.table(2))
    assert caller.pager.computed(1) == 4


def test_free_in_flight_is_carried_out_when_the_step_has_ended() -> None:
    caller = Caller()
    caller.prompt(1, ids(6))
    epoch = caller.launch(1, 2)
    assert caller(Free(1)) == []
    assert caller(StepRetired(epoch, (ids(2, 6),))) == [Release(1)]
    assert caller.admit(2, ids(9))[-1] == Admitted(2, 8, False)


def test_truncation_into_a_page_does_not_spoil_the_page_for_others() -> None:
    caller = Caller()
    caller.prompt(1, ids(8))
    caller.admit(2, ids(9))
    caller.compute(2, ids(1, 8))
    shared = caller.table(2)[1]
    caller(Truncate(2, 6))
    (copy, _) = caller(Reserve((2,), (1,)))
    assert copy == CopyBlock(2, 1, shared, caller.table(2)[1], 2)
    assert caller.table(1)[1] == shared


# ------------------------------------------------------------------------------ swap and cache


def test_swap_keeps_every_token_and_resume_finds_them() -> None:
    caller = Caller(ram=8, keep=False)
    caller.prompt(1, ids(10))
    table = caller.table(1)
    store, *rest = caller(Preempt(1, PreemptMode.SWAP))
    assert isinstance(store, Store)
    assert [page.block for page in store.pages] == list(table)
    assert [page.tokens for page in store.pages] == [4, 4, 2]
    assert rest == [Release(1), Preempted(1, PreemptMode.SWAP, 0)]
    assert caller(Resume(1)) == [Deferred(1, DeferReason.TRANSFER, 3, 29)]
    caller(TransferDone(store.transfer))
    assert caller.free == 32
    load, admitted = caller(Resume(1))
    assert isinstance(load, Load)
    assert [page.slot for page in load.pages] == [page.slot for page in store.pages]
    assert admitted == Admitted(1, 10, True)
    assert caller(TransferDone(load.transfer)) == [Runnable(1, 10)]
    # The full pages stay in RAM as cached ones; the tail was this sequence's alone.
    assert (caller.pager.stats().ram.used, caller.pager.stats().ram.cached) == (0, 2)


def test_a_page_already_in_ram_is_not_stored_again() -> None:
    caller = Caller(ram=16, keep=False)
    caller.prompt(1, ids(8))
    (store, _) = caller(Free(1))
    assert isinstance(store, Store)
    assert [len(store.pages), store.seq] == [2, 1]
    caller(TransferDone(store.transfer))
    load, _ = caller.admit(2, ids(9))
    assert isinstance(load, Load)
    caller(TransferDone(load.transfer))
    caller.compute(2, ids(4, 8))
    (store, _) = caller(Free(2))
    assert isinstance(store, Store)
    assert [page.index for page in store.pages] == [2]


def test_with_no_room_below_the_victim_is_recomputed() -> None:
    caller = Caller(ram=2, keep=False, reserve=0.0)
    caller.prompt(1, ids(12))
    store, _, preempted = caller(Preempt(1, PreemptMode.SWAP))
    assert isinstance(store, Store)
    assert len(store.pages) == 2  # what fits is cached
    assert preempted == Preempted(1, PreemptMode.RECOMPUTE, 4)
    caller(TransferDone(store.transfer))
    assert caller(Resume(1))[-1] == Admitted(1, 8, True)


def test_caching_never_takes_what_is_reserved_for_swapping() -> None:
    caller = Caller(ram=8, keep=False, reserve=0.5)
    for seq in range(4):
        caller.prompt(seq, ids(8, 100 * seq))
        store, _ = caller(Free(seq))
        assert isinstance(store, Store)
        caller(TransferDone(store.transfer))
    assert caller.pager.stats().ram.cached == 4
    caller.prompt(9, ids(16, 900))
    assert caller(Preempt(9))[-1] == Preempted(9, PreemptMode.SWAP, 0)


def test_the_oldest_prefix_leaves_ram_first_and_from_its_end() -> None:
    caller = Caller(ram=4, keep=False, reserve=0.0)
    for seq in range(2):
        caller.prompt(seq, ids(8, 100 * seq))
        store, _ = caller(Free(seq))
        assert isinstance(store, Store)
        caller(TransferDone(store.transfer))
    caller.prompt(2, ids(4, 200))
    store, _ = caller(Free(2))
    assert isinstance(store, Store)
    caller(TransferDone(store.transfer))
    assert caller.admit(10, ids(9))[-1] == Admitted(10, 4, True)
    assert caller.admit(11, ids(9, 100))[-1] == Admitted(11, 8, True)


def test_cached_pages_are_evicted_to_make_room() -> None:
    caller = Caller(gpu=6)
    caller.prompt(1, ids(16))
    caller(Free(1))
    assert caller.pager.stats().gpu.cached == 4
    assert caller.admit(2, ids(16, 50)) == [Admitted(2, 0, False)]
    # The end of the cached prefix went first.
    assert caller(Free(2, cache=False)) == [Release(2)]
    assert caller.admit(3, ids(16))[-1] == Admitted(3, 8, False)


def test_a_long_text_that_was_copied_down_in_pieces_leaves_before_a_younger_one() -> None:
    caller = Caller(gpu=1024, ram=2048)
    caller.validate = False  # a thousand blocks after each of hundreds of events
    for seq in range(22):
        caller.prompt(seq, ids(50 * SIZE, 1000 * seq))
        caller(Free(seq))
        caller.settle()
    caller.pager.validate()
    # 76 of 1,100 pages had to go: the oldest text's 50, and 26 of the one after it.
    loads = [item for item in caller.admit(22, ids(50 * SIZE + 1)) if isinstance(item, Load)]
    assert [len(load.pages) for load in loads] == [50]


def test_pages_next_in_line_are_written_back_so_that_evicting_them_loses_nothing() -> None:
    caller = Caller(gpu=6, ram=8)
    caller.prompt(1, ids(12))
    caller.prompt(2, ids(5, 50))
    epoch = caller.launch(1, 4)
    caller(Free(1))
    store = caller(StepRetired(epoch, (ids(4, 12),)))[-1]
    assert isinstance(store, Store)
    assert store.seq == -1
    last = store.pages[0].block
    caller(TransferDone(store.transfer))
    # The page that was written back is evicted first, and found again.
    caller.compute(2, ids(4, 55))
    assert last in caller.table(2)
    caller(Free(2, cache=False))
    out = caller.admit(3, ids(17))
    assert out[0] == Attach(3, 0, caller.table(3)[:3], 12)
    assert out[-1] == Admitted(3, 16, True)


def test_a_failed_load_leaves_the_front_and_says_where_to_go_on() -> None:
    caller = Caller(ram=16, keep=False)
    caller.prompt(1, ids(12))
    store, _ = caller(Free(1))
    assert isinstance(store, Store)
    caller(TransferDone(store.transfer))
    load, _ = caller.admit(3, ids(13))
    assert isinstance(load, Load)
    assert caller(TransferFailed(load.transfer)) == [Trim(3, 0), Runnable(3, 0)]
    caller.compute(3, ids(13))
    assert caller.pager.computed(3) == 13


def test_a_failed_store_costs_a_swapped_sequence_its_pages_from_there_on() -> None:
    caller = Caller(ram=16, keep=False)
    caller.prompt(1, ids(4))
    store, _ = caller(Free(1))
    assert isinstance(store, Store)
    caller(TransferDone(store.transfer))
    load, _ = caller.admit(2, ids(10))
    assert isinstance(load, Load)
    caller(TransferDone(load.transfer))
    caller.compute(2, ids(6, 4))
    store, *_ = caller(Preempt(2, PreemptMode.SWAP))
    assert isinstance(store, Store)
    caller(TransferFailed(store.transfer))
    load, admitted = caller(Resume(2))
    assert admitted == Admitted(2, 4, True)


def test_who_wants_a_page_that_is_being_loaded_waits_for_that_load() -> None:
    caller = Caller(ram=16, keep=False)
    caller.prompt(1, ids(8))
    store, _ = caller(Free(1))
    assert isinstance(store, Store)
    caller(TransferDone(store.transfer))
    load, _ = caller.admit(2, ids(9))
    assert isinstance(load, Load)
    assert caller.admit(3, ids(9)) == [Admitted(3, 8, True)]
    # The loader ends meanwhile; the other still gets its share before that.
    assert caller(Free(2)) == []
    out = caller(TransferDone(load.transfer))
    blocks = tuple(page.block for page in load.pages)
    assert out == [Attach(3, 0, blocks, 8), Runnable(3, 8), Release(2)]


def test_a_group_is_preempted_and_resumed_together_and_its_shared_pages_move_once() -> None:
    caller = Caller(ram=32, keep=False)
    caller.prompt(1, ids(10), width=3, group=5)
    caller(Fork(1, (2, 3)))
    out = caller(Preempt(2, PreemptMode.SWAP))
    stores = [item for item in out if isinstance(item, Store)]
    assert sum(len(store.pages) for store in stores) == 3
    assert {item.seq for item in out if isinstance(item, Preempted)} == {1, 2, 3}
    for store in stores:
        caller(TransferDone(store.transfer))
    out = caller(Resume(1))
    loads = [item for item in out if isinstance(item, Load)]
    assert [len(load.pages) for load in loads] == [3]
    assert {item.seq for item in out if isinstance(item, Admitted)} == {1, 2, 3}
    out = caller(TransferDone(loads[0].transfer))
    assert {item.seq for item in out if isinstance(item, Runnable)} == {1, 2, 3}


def test_three_hundred_prefixes_are_all_found_again_in_ram() -> None:
    caller = Caller(gpu=16, ram=1000, keep=False, max_sequences=256)
    caller.validate = False
    for seq in range(300):
        caller.prompt(seq, ids(9, 100 * seq))
        store, _ = caller(Free(seq))
        assert isinstance(store, Store)
        caller(TransferDone(store.transfer))
    for seq in range(300):
        load, admitted = caller.admit(1000 + seq, ids(9, 100 * seq))
        assert admitted == Admitted(1000 + seq, 8, True)
        assert isinstance(load, Load)
        caller(TransferDone(load.transfer))
        caller(Free(1000 + seq))
    caller.pager.validate()


# --------------------------------------------------------------------------------------- disk


def finished(caller: Caller, out: list[Instruction]) -> None:
    """Report every transfer in ``out``, and those that follow, as done."""
    waiting = list(out)
    while waiting:
        item = waiting.pop(0)
        if isinstance(item, (Store, Load, Spill)):
            waiting += caller(TransferDone(item.transfer))


def test_a_swap_that_ram_has_no_room_for_goes_on_disk() -> None:
    caller = Caller(ram=2, disk=8, keep=False, reserve=0.0)
    caller.prompt(1, ids(14))
    out = caller(Preempt(1, PreemptMode.SWAP))
    stores = [item for item in out if isinstance(item, Store)]
    assert [(item.tier, len(item.pages)) for item in stores] == [(Tier.RAM, 2), (Tier.DISK, 2)]
    assert out[-2:] == [Release(1), Preempted(1, PreemptMode.SWAP, 0)]
    finished(caller, out)
    out = caller(Resume(1))
    loads = [item for item in out if isinstance(item, Load)]
    assert [(item.tier, len(item.pages)) for item in loads] == [(Tier.RAM, 2), (Tier.DISK, 2)]
    assert caller(TransferDone(loads[1].transfer)) == []
    assert Runnable(1, 14) in caller(TransferDone(loads[0].transfer))


def test_pages_leave_ram_for_disk_before_they_are_evicted_and_are_found_there() -> None:
    caller = Caller(ram=4, disk=16, keep=False, reserve=0.0)
    for seq in range(4):
        caller.prompt(seq, ids(8, 100 * seq))
        finished(caller, caller(Free(seq)))
    assert caller.pager.stats().ram.cached == 4
    for seq in range(4):
        out = caller.admit(10 + seq, ids(9, 100 * seq))
        assert out[-1] == Admitted(10 + seq, 8, True)
        finished(caller, out)


def test_a_load_from_disk_that_fails_leaves_what_came_from_ram() -> None:
    caller = Caller(ram=2, disk=8, keep=False, reserve=0.0)
    caller.prompt(1, ids(14))
    finished(caller, caller(Preempt(1, PreemptMode.SWAP)))
    out = caller(Resume(1))
    from_ram, from_disk = (item for item in out if isinstance(item, Load))
    assert caller(TransferFailed(from_disk.transfer)) == [Trim(1, 8)]
    assert Runnable(1, 8) in caller(TransferDone(from_ram.transfer))


# ------------------------------------------------------------------------ victims and pressure


def test_errors_and_broken_invariants_tell_the_story() -> None:
    caller = Caller()
    caller.prompt(1, ids(5))
    caller(Free(1))
    with pytest.raises(ImpossibleEventError) as caught:
        caller(Reserve((1,), (1,)))
    assert any("admitted" in line for line in caught.value.story)
    assert any("step 0 retired" in line for line in caught.value.story)
    with pytest.raises(ImpossibleEventError):
        caller(TransferDone(1))
    caller.prompt(2, ids(5, 50))
    caller.pager._pool.blocks.refcount[caller.table(2)[0]] += 1
    with pytest.raises(InvariantError) as broken:
        caller.pager.validate()
    assert any("admitted" in line for line in broken.value.story)


@pytest.mark.parametrize(
    "config",
    [
        PagerConfig(gpu_blocks=0),
        PagerConfig(gpu_blocks=4, block_tokens=0),
        PagerConfig(gpu_blocks=4, ram_blocks=-1),
        PagerConfig(gpu_blocks=4, growth_margin=1.0),
        PagerConfig(gpu_blocks=4, ram_swap_reserve=1.5),
    ],
)
def test_a_pool_of_impossible_shape_is_refused(config: PagerConfig) -> None:
    with pytest.raises(ValueError, match="PagerConfig"):
        Pager(config)


# -------------------------------------------------------------------------------- bookkeeping


def test_bookkeeping_is_at_most_120_bytes_per_block_and_no_object_per_block() -> None:
    pager = Pager(PagerConfig(gpu_blocks=4096, ram_blocks=4096))
    pool = pager._pool
    total = pool.blocks.nbytes + pool.ram.nbytes + pool.index.nbytes
    assert total / 8192 <= 120
    held = [*vars(pool.blocks).values(), *vars(pool.index).values(), *vars(pool.ram).values()]
    assert not any(isinstance(item, (list, dict, set, tuple)) and len(item) > 8 for item in held)


def test_the_split_counts_every_token_once() -> None:
    caller = Caller()
    caller.prompt(1, ids(10))
    caller(Fork(1, (2,)))
    split = caller.pager.stats().split
    assert (split.token_state, split.reserved, split.internal, split.external) == (10, 0, 2, 0)
    caller(Reserve((1, 2), (1, 1)))
    split = caller.pager.stats().split
    assert split.reserved == 2
    assert split.token_state + split.reserved + split.internal == 4 * SIZE
    assert Tier.GPU < Tier.RAM < Tier.DISK


def test_a_step_may_retire_with_fewer_tokens_than_were_launched() -> None:
    world = Pager(PagerConfig(gpu_blocks=8, keep_cached_on_gpu=True))
    prompt = np.arange(20, dtype=np.int32)
    world.handle(Admit(1, prompt, bytes(32)))
    world.handle(StepLaunched(1, (1,), (20,)))
    world.handle(StepRetired(1, (prompt,)))
    (reserved,) = world.handle(Reserve((1,), (8,)))
    assert isinstance(reserved, Reserved)
    assert not reserved.short
    world.handle(StepLaunched(2, (1,), (8,)))
    assert (world.computed(1), world.length(1)) == (20, 28)
    world.handle(StepRetired(2, (np.array([7, 8, 9], np.int32),)))
    world.validate()
    assert (world.computed(1), world.length(1)) == (23, 23)
    world.handle(Reserve((1,), (1,)))
    world.handle(StepLaunched(3, (1,), (1,)))
    with pytest.raises(ImpossibleEventError):
        world.handle(StepRetired(3, (np.array([], np.int32),)))
    world.handle(StepRetired(3, (np.array([10], np.int32),)))
    world.validate()
    assert world.computed(1) == 24


# ------------------------------------------------------------------------- forks and prefixes


def test_admission_counts_the_block_that_each_further_sample_takes_right_after_the_fork() -> None:
    caller = Caller(gpu=8)
    assert caller.admit(1, ids(6), width=3) == [Admitted(1, 0, False)]
    # Two blocks of the prompt, and two that the forks are going to take.
    assert caller.admit(2, ids(20, 50)) == [Deferred(2, DeferReason.BLOCKS, 5, 4)]
    assert caller.admit(2, ids(16, 50)) == [Admitted(2, 0, False)]
    caller.compute(1, ids(6))
    caller(Fork(1, (3, 4)))
    out = caller(Reserve((1, 3, 4), (1, 1, 1)))
    assert out[-1] == Reserved(())
    assert sum(isinstance(item, CopyBlock) for item in out) == 2


def test_a_request_wider_than_the_pool_has_blocks_for_is_denied() -> None:
    caller = Caller(gpu=8)
    assert caller.admit(1, ids(24), width=3) == [Denied(1, 9, 8)]


def test_nobody_waits_for_a_prefix_that_a_lower_class_computes() -> None:
    caller = Caller()
    caller.admit(1, ids(9), klass=PriorityClass.BACKGROUND)
    waiting = caller.admit(2, ids(9), klass=PriorityClass.BACKGROUND)
    assert [type(item) for item in waiting] == [Deferred]
    assert caller.admit(3, ids(9), klass=PriorityClass.INTERACTIVE) == [Admitted(3, 0, False)]
    # Both are computed, and what is complete first is found.
    caller.compute(3, ids(9))
    assert caller.admit(2, ids(9), klass=PriorityClass.BACKGROUND)[-1] == Admitted(2, 8, False)
    caller.compute(1, ids(9))
