"""Events that cannot be, and a fingerprint that shows that they changed nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvpager import (
    Admit,
    Event,
    Fork,
    Free,
    ImpossibleEventError,
    Pager,
    Preempt,
    Pressure,
    Reserve,
    Resume,
    SetQuota,
    StepFailed,
    StepLaunched,
    StepRetired,
    TransferDone,
    TransferFailed,
    Truncate,
)
from tests.support.pager_models import ROOTS, WrongContentError, check

if TYPE_CHECKING:
    from tests.support.pager_world import World


def nonsense_for(world: World) -> list[Event]:
    """Events that are impossible as the world stands."""
    some = world.rng.choice([*world.models, 10**6])
    status = world.models[some].status if some in world.models else "unknown"
    nonsense: list[Event] = [
        StepRetired(world.next_epoch, ()),
        StepFailed(world.next_epoch + 1),
        TransferDone(10**6),
        TransferFailed(0),
        Pressure(world.config.gpu_blocks + 1),
        SetQuota(ROOTS[0], 5, 4),
        Fork(10**6, (1,)),
        StepLaunched(world.next_epoch - 5, (), ()),
        Admit(some, np.array([], dtype=np.int32), ROOTS[0]),
    ]
    if status != "running":
        nonsense += [Reserve((some,), (1,)), StepLaunched(world.next_epoch, (some,), (1,))]
    if status in ("asking", "ending", "unknown"):
        nonsense += [Free(some), Truncate(some, 0), Preempt(some), Resume(some)]
    if status == "running":
        nonsense += [
            Resume(some),
            Truncate(some, world.models[some].length + 1),
            Truncate(some, -1),
            StepLaunched(world.next_epoch, (some,), (10**6,)),
            Fork(some, (some,)),
            Reserve((some,), (0,)),
        ]
    return nonsense


def refused(pager: Pager, event: Event) -> None:
    """The pager raises, with a story, and is what it was."""
    before = fingerprint(pager)
    try:
        out = pager.handle(event)
    except ImpossibleEventError as error:
        check(error.story is not None, "an error without a story")
    else:
        raise WrongContentError(f"{event} was accepted: {out}")
    check(fingerprint(pager) == before, f"{event} was refused, but changed something")


def fingerprint(pager: Pager) -> list[object]:
    """Everything a pager is made of, stories aside."""
    pool, seqs, transfers = pager._pool, pager._seqs, pager._transfers
    arrays = pool.blocks
    seen: list[object] = [
        arrays.limit,
        pager._shrinking.waiting,
        *(bytes(item) for item in (arrays.refcount, arrays.pins, arrays.state, arrays.node)),
        bytes(arrays.epoch),
        list(arrays.free),
        list(arrays.cached),
        list(arrays.dying),
        *(bytes(item) for item in (*pool.index.where, *pool.index.children, pool.index.parent)),
        [
            (bytes(tier.state), bytes(tier.holds), bytes(tier.pins), bytes(tier.node))
            for tier in pool.lower.values()
        ],
        [list(tier.cached) for tier in pool.lower.values()],
        [(s.root, s.members, s.used, s.floor, s.ceiling) for s in seqs.quotas.by_root.values()],
        pool.retired_epoch,
        dict(pool.loading),
        (seqs.ids_used, seqs.launched_epoch, seqs.retired_epoch, sorted(seqs.runnable.items())),
        [sorted(item) for item in (seqs.pending, seqs.prefilling, seqs.swapped, seqs.trimming)],
        [(record.epoch, record.valid.tolist()) for record in seqs.steps],
        sorted(transfers.live),
    ]
    for state in seqs.by_id.values():
        slot = state.slot
        seen.append((state.id, slot, state.status, state.blocks_held.tolist(), bytes(state.chain)))
        seen.append((state.until, state.granted, dict(state.sources)))
        seen.append((state.ids, state.held[:], state.known[: state.known_tokens].tolist()))
        seen += [
            values[slot].tolist()
            for values in (
                seqs.computed,
                seqs.length,
                seqs.capacity,
                seqs.promised,
                seqs.write_block,
                seqs.in_flight,
            )
        ]
    return seen
