"""What must hold after every event. Slow (it looks at everything); for tests and idle moments."""

from __future__ import annotations

from collections import Counter

import numpy as np

from kvpager.blocks import ACTIVE, CACHED, DYING, FREE, LOADING, STORING
from kvpager.errors import InvariantError
from kvpager.pool import Pool
from kvpager.prefix import DIGEST
from kvpager.pressure import Shrinking
from kvpager.sequences import SequenceState, SequenceTable, Status
from kvpager.tiers import LowerTier, SlotState
from kvpager.transfers import Transfers
from kvpager.types import Spill, Store, Tier


def check(pool: Pool, seqs: SequenceTable, transfers: Transfers, shrinking: Shrinking) -> None:
    """Raise on the first contradiction.

    Raises:
        InvariantError: With the story of a sequence concerned, where there is one.
    """
    _Check(pool, seqs, transfers, shrinking).run()


class _Check:
    def __init__(
        self, pool: Pool, seqs: SequenceTable, transfers: Transfers, shrinking: Shrinking
    ) -> None:
        self.pool = pool
        self.shrinking = shrinking
        self.seqs = seqs
        self.transfers = transfers
        self.size = pool.config.block_tokens
        self.holders: dict[int, SequenceState] = {}

    def run(self) -> None:
        for state in self.seqs.by_id.values():
            self.sequence(state)
        self.membership()
        self.quotas()
        self.references()
        self.blocks()
        self.limit()
        self.steps()
        self.slots(self.pool.ram)
        self.slots(self.pool.disk)
        self.index()

    def require(self, condition: object, what: str, state: SequenceState | None = None) -> None:
        if not condition:
            raise InvariantError(what, self.seqs.story(state.id) if state is not None else ())

    # ------------------------------------------------------------------------------ sequences

    def sequence(self, state: SequenceState) -> None:
        seqs, slot, who = self.seqs, state.slot, f"sequence {state.id}"
        computed, length = int(seqs.computed[slot]), int(seqs.length[slot])
        self.require(seqs.by_slot[slot] is state, f"{who}: its slot is another's", state)
        self.require(0 <= computed <= length, f"{who}: {computed} computed of {length}", state)
        self.require(
            state.known_tokens >= computed // self.size * self.size,
            f"{who}: forgot its tokens",
            state,
        )
        self.require(
            len(state.chain) >= computed // self.size * DIGEST, f"{who}: chain too short", state
        )
        if state.status is Status.SWAPPED:
            self.require(not state.blocks, f"{who}: swapped, but has blocks", state)
            self.require(
                len(state.held) <= -(-computed // self.size), f"{who}: holds too much", state
            )
            return
        self.require(not state.held, f"{who}: runs, but holds slots below", state)
        room = state.blocks * self.size
        self.restoring(state)
        wanted = room if state.until < 0 else state.until
        self.require(seqs.capacity[slot] == wanted <= room, f"{who}: capacity", state)
        self.require(length <= seqs.capacity[slot], f"{who}: {length} tokens without room", state)
        index = length // self.size
        wanted = int(state.table[index]) if index < state.blocks else -1
        self.require(seqs.write_block[slot] == wanted, f"{who}: cursor", state)
        table = state.blocks_held.tolist()
        self.require(len(set(table)) == len(table), f"{who}: a block twice in {table}", state)
        self.pages(state, table, computed, length)

    def restoring(self, state: SequenceState) -> None:
        """What is computed and loaded at once has an end to compute to, and pages to load."""
        who, restore = f"sequence {state.id}", state.restore
        known = state.id in self.seqs.restoring
        self.require(known == (restore is not None), f"{who}: restoring", state)
        self.require(known == (state.until >= 0), f"{who}: until {state.until}", state)
        self.require(restore is not None or not state.sources, f"{who}: holds slots", state)
        if restore is not None:
            self.require(restore.remaining, f"{who}: restored, and does not know", state)
            self.require(state.pending is None, f"{who}: restores what is to end", state)

    def pages(self, state: SequenceState, table: list[int], computed: int, length: int) -> None:
        """Registered blocks in its table are the pages of its own prefix."""
        blocks, who = self.pool.blocks, f"sequence {state.id}"
        full = computed // self.size
        for i, block in enumerate(table):
            self.holders[block] = state
            self.require(
                blocks.state[block] in (ACTIVE, LOADING),
                f"{who}: block {block} is not active",
                state,
            )
            node = blocks.node[block]
            behind = 0 <= state.until <= i * self.size
            if (i < full or behind) and node >= 0:
                digest = bytes(state.chain[i * DIGEST : (i + 1) * DIGEST])
                self.require(
                    self.pool.index.digest(node) == digest,
                    f"{who}: block {block} is another page",
                    state,
                )
            unwritten = i > length // self.size or i * self.size == length
            if unwritten and not behind:
                self.require(
                    node < 0 and blocks.refcount[block] == 1,
                    f"{who}: block {block}, yet to be written, is not its own",
                    state,
                )
        if state.status is Status.RUNNING:
            front = table if state.until < 0 else table[: state.until // self.size]
            loading = [block for block in front if blocks.state[block] == LOADING]
            self.require(not loading, f"{who}: runs while {loading} are loading", state)

    def membership(self) -> None:
        seqs = self.seqs
        live = seqs.by_id.values()
        self.require(
            seqs.ids_used == sum(state.ids for state in live if state.status is not Status.SWAPPED),
            f"{seqs.ids_used} sequence ids in use",
        )
        limit = self.pool.config.max_sequences
        self.require(not limit or seqs.ids_used <= limit, f"{seqs.ids_used} ids of {limit}")
        for state in live:
            runs = state.status is Status.RUNNING and state.pending is None
            who = f"sequence {state.id}"
            self.require((state.id in seqs.runnable) == runs, f"{who}: runnable", state)
            self.require(
                (state.id in seqs.pending) == (state.pending is not None), f"{who}: pending", state
            )
            self.require(
                (state.id in seqs.swapped) == (state.status is Status.SWAPPED),
                f"{who}: swapped",
                state,
            )
            behind = bool(seqs.computed[state.slot] < state.known_tokens)
            behind &= state.status is not Status.SWAPPED
            self.require((state.id in seqs.prefilling) == behind, f"{who}: prefilling", state)
            waits = bool(state.loads) and not 0 <= seqs.computed[state.slot] < state.until
            self.require(
                (state.status is Status.LOADING) == waits,
                f"{who}: waits for nothing",
                state,
            )
            if state.pending is not None:
                self.require(
                    seqs.busy(state), f"{who}: nothing keeps it, yet it is still here", state
                )

    def quotas(self) -> None:
        """Each namespace counts its members, and the blocks in their tables once."""
        live = self.seqs.by_id.values()
        for root, space in self.seqs.quotas.by_root.items():
            mine = [state for state in live if state.space is space]
            held = {block for state in mine for block in state.blocks_held.tolist()}
            name = f"namespace {root.hex()[:8]}"
            self.require(space.members == len(mine), f"{name}: {space.members} members")
            self.require(space.used == len(held), f"{name}: {space.used} blocks, not {len(held)}")
            self.require(mine or space.floor or space.ceiling, f"{name}: left over")
        known = self.seqs.quotas.by_root
        for state in live:
            self.require(known.get(state.root) is state.space, "a namespace nobody knows", state)

    # --------------------------------------------------------------------------------- blocks

    def references(self) -> None:
        counts = Counter(
            block for state in self.seqs.by_id.values() for block in state.blocks_held.tolist()
        )
        pins = Counter(
            page.block
            for transfer in self.transfers.live.values()
            if not isinstance(transfer.instruction, Spill)
            for page in transfer.instruction.pages
        )
        blocks = self.pool.blocks
        for block in range(blocks.total):
            state = self.holders.get(block)
            self.require(
                blocks.refcount[block] == counts[block],
                f"block {block}: {blocks.refcount[block]} references, {counts[block]} tables",
                state,
            )
            self.require(blocks.pins[block] == pins[block], f"block {block}: pins", state)

    def blocks(self) -> None:
        blocks = self.pool.blocks
        free = set(blocks.free)
        cached = list(blocks.cached)
        self.require(len(free) == len(blocks.free), "a block is free twice")
        self.require(
            len(cached) == blocks.cached.count == len(set(cached)), "order of cached blocks"
        )
        in_use = {(until, block) for until, block in blocks.dying}
        for block in range(blocks.total):
            state, held = blocks.state[block], self.holders.get(block)
            name = f"block {block} in state {state}"
            unused = state == FREE and block < blocks.limit
            self.require((block in free) == unused, f"{name}: free stack", held)
            self.require(
                (block in blocks.cached) == (state == CACHED), f"{name}: cached order", held
            )
            if blocks.refcount[block]:
                self.require(state in (ACTIVE, LOADING), f"{name}: referenced", held)
            else:
                self.require(state != ACTIVE, f"{name}: nobody's", held)
            if state in (FREE, CACHED):
                self.require(not blocks.pins[block], f"{name}: a transfer names it", held)
                self.require(
                    blocks.epoch[block] <= self.pool.retired_epoch, f"{name}: a step names it"
                )
            if state == STORING:
                self.require(blocks.pins[block], f"{name}: no store", held)
            if state == CACHED:
                self.require(
                    blocks.node[block] >= 0 and block < blocks.limit, f"{name}: no page", held
                )
                self.require(self.pool.config.keep_cached_on_gpu, f"{name}: must not cache here")
            if state == FREE:
                self.require(blocks.node[block] < 0, f"{name}: still a page", held)
            if state == DYING:
                self.require((blocks.epoch[block], block) in in_use, f"{name}: forgotten")
            self.require(
                (state == LOADING) == (block in self.pool.loading), f"{name}: loading", held
            )

    def limit(self) -> None:
        """What has been given back is free, and nobody is waited for in vain."""
        arrays = self.pool.blocks
        beyond = arrays.states[arrays.limit : arrays.total] != FREE
        self.require(beyond.any() == self.shrinking.waiting, "blocks beyond the limit")

    def steps(self) -> None:
        seqs, blocks = self.seqs, self.pool.blocks
        in_flight = Counter(int(slot) for record in seqs.steps for slot in record.slots)
        for state in seqs.by_id.values():
            slot = state.slot
            self.require(
                seqs.in_flight[slot] == in_flight[slot], f"sequence {state.id}: in flight", state
            )
            launched = sum(int(record.valid[record.slots == slot].sum()) for record in seqs.steps)
            self.require(
                seqs.computed[slot] + launched == seqs.length[slot],
                f"sequence {state.id}: length",
                state,
            )
        self.require(all(record.epoch > seqs.retired_epoch for record in seqs.steps), "epochs")
        self.require(self.pool.retired_epoch == seqs.retired_epoch, "retired epoch")
        self.require(bool(np.all(blocks.refcounts >= 0)), "negative references")

    # ----------------------------------------------------------------------------- below, index

    def slots(self, tier: LowerTier) -> None:
        pins: Counter[int] = Counter()
        filling: set[int] = set()
        for item in self.transfers.live.values():
            pins.update(place.slot for place in item.touched if place.tier is tier)
            what = item.instruction
            if isinstance(what, Spill):
                if what.source is tier.tier:
                    pins.update(move.source for move in what.pages)
                if what.target is tier.tier:
                    pins.update(move.target for move in what.pages)
                    filling.update(move.target for move in what.pages)
            elif what.tier is tier.tier:
                pins.update(page.slot for page in what.pages)
                if isinstance(what, Store):
                    filling.update(page.slot for page in what.pages)
        holds = Counter(
            place.slot
            for state in self.seqs.swapped.values()
            for place in state.held
            if place.tier is tier
        )
        holds.update(
            place.slot
            for state in self.seqs.restoring.values()
            for place in state.sources.values()
            if place.tier is tier
        )
        free, cached = set(tier.free), list(tier.cached)
        self.require(len(free) == len(tier.free), "a slot is free twice")
        self.require(len(cached) == tier.cached.count == len(set(cached)), "order of cached slots")
        self.require(tier.held == len(holds), f"{tier.held} slots held, not {len(holds)}")
        if tier.tier is Tier.DISK:
            kept = (slot for slot in range(tier.total) if tier.node[slot] >= 0)
            owned = Counter(
                self.pool.index.owner(tier.node[slot]) for slot in kept if not tier.holds[slot]
            )
            self.require(tier.owned() == owned, f"{tier.owned()} slots by owner, not {owned}")
        for slot in range(tier.total):
            state, name = SlotState(tier.state[slot]), f"{tier.tier.name} slot {slot}"
            self.require((slot in free) == (state is SlotState.FREE), f"{name}: free stack")
            self.require(tier.pins[slot] == pins[slot], f"{name}: pins")
            self.require(tier.holds[slot] == holds[slot], f"{name}: holds")
            self.require((state is SlotState.FILLING) == (slot in filling), f"{name}: {state.name}")
            reclaimable = state is SlotState.READY and not pins[slot] and not holds[slot]
            self.require((slot in tier.cached) == reclaimable, f"{name}: cached order")
            if state is SlotState.FREE:
                self.require(not pins[slot] and not holds[slot], f"{name}: in use")
            node = tier.node[slot]
            self.require(
                node < 0 or self.pool.index.where[tier.tier][node] == slot, f"{name}: its page"
            )
        self.require(
            tier.total - len(free) - tier.held <= max(tier.cache_limit, len(pins)) + len(pins),
            f"{tier.tier.name}: cached pages take what is reserved for swapping",
        )

    def index(self) -> None:
        index, pool = self.pool.index, self.pool
        nodes = index.nodes()
        children = {tier: Counter[int]() for tier in Tier}
        for node in nodes:
            name = f"page {node}"
            block = index.where[Tier.GPU][node]
            self.require(block < 0 or pool.blocks.node[block] == node, f"{name}: its block")
            for tier in (pool.ram, pool.disk):
                slot = index.where[tier.tier][node]
                self.require(slot < 0 or tier.node[slot] == node, f"{name}: its slot")
            tiers = [tier for tier in Tier if index.where[tier][node] >= 0]
            self.require(tiers, f"{name}: resident nowhere")
            self.require(index.find(index.digest(node)) == node, f"{name}: cannot be found")
            for tier_ in tiers:
                children[tier_][index.parent[node]] += 1
        registered = sum(1 for node in pool.blocks.node if node >= 0)
        on_gpu = sum(1 for node in nodes if index.where[Tier.GPU][node] >= 0)
        self.require(
            registered == on_gpu, f"{registered} blocks are pages, {on_gpu} pages have blocks"
        )
        for node in nodes:
            for tier_ in Tier:
                self.require(
                    index.children[tier_][node] == children[tier_][node], f"page {node}: children"
                )
