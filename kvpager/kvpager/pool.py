"""The first tier and the index over it: the one place where blocks are taken and let go."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from kvpager.blocks import ACTIVE, CACHED, DYING, FREE, LOADING, STORING, BlockArrays
from kvpager.prefix import PageIndex
from kvpager.quotas import Namespace
from kvpager.tiers import Evict, LowerTier, Place
from kvpager.types import PagerConfig, Tier

_CLEAN_LOOKAHEAD = 16


class Pool:
    """Blocks with their pages, over the lower tier."""

    def __init__(self, config: PagerConfig) -> None:
        self.config = config
        self.blocks = BlockArrays(config.gpu_blocks)
        self.index = PageIndex(config.gpu_blocks + config.ram_blocks + config.disk_blocks)
        self.ram = LowerTier(Tier.RAM, config.ram_blocks, config.ram_swap_reserve, self.index)
        self.disk = LowerTier(Tier.DISK, config.disk_blocks, 0.0, self.index)
        self.lower = {Tier.RAM: self.ram, Tier.DISK: self.disk}
        """The lower tiers, fastest first."""
        self.retired_epoch = -1
        self.fresh_blocks: deque[int] = deque()
        self.fresh_slots: deque[int] = deque()
        """Blocks, and slots of RAM, that were cached and may not be on a disk that persists yet."""
        self.loading: dict[int, int] = {}
        """Blocks being loaded, each with its transfer."""

    # -------------------------------------------------------------------------------- taking

    def available(self, space: Namespace) -> int:
        """Blocks that sequences of this namespace can have at once."""
        room = space.room()
        free = self.blocks.available()
        return free if room is None else min(free, room)

    def take(self, count: int, space: Namespace) -> list[int]:
        """``count`` blocks with one reference each, evicting cached pages where no block is free.

        The caller has checked that there are so many: nothing ever waits in here.
        """
        assert count <= self.blocks.available()
        space.used += count
        taken = self.blocks.pop_free(count)
        evict = self._evict_one
        taken += [evict() for _ in range(count - len(taken))]
        if taken:
            which = np.array(taken, dtype=np.intp)
            self.blocks.states[which] = ACTIVE
            self.blocks.refcounts[which] = 1
        return taken

    def share(self, blocks: npt.NDArray[np.int32], space: Namespace) -> None:
        """One reference more for each of ``blocks``, which are distinct."""
        arrays = self.blocks
        space.used += int((arrays.refcounts[blocks] == 0).sum())
        states = arrays.states[blocks]
        for block in blocks[states == CACHED].tolist():
            arrays.cached.remove(block)
        # A block being loaded stays so until its transfer ends, whoever joins meanwhile.
        arrays.states[blocks[states != LOADING]] = ACTIVE
        arrays.refcounts[blocks] += 1

    # ---------------------------------------------------------------------------- letting go

    def release(
        self,
        blocks: Sequence[int] | npt.NDArray[np.int32],
        space: Namespace,
        epoch: int = -1,
    ) -> None:
        """One reference less for each of ``blocks``, last block of the sequence first.

        Args:
            blocks: In logical order, distinct.
            space: The namespace of the sequence that lets go.
            epoch: The last step in flight that may touch them, -1 for none.
        """
        which = np.asarray(blocks, dtype=np.intp)[::-1]
        arrays = self.blocks
        if epoch > self.retired_epoch:
            for block in which.tolist():
                arrays.epoch[block] = max(arrays.epoch[block], epoch)
        arrays.refcounts[which] -= 1
        unreferenced = which[arrays.refcounts[which] == 0].tolist()
        space.used -= len(unreferenced)
        for block in unreferenced:
            self.settle(block)

    def settle(self, block: int, *, back: bool = False) -> None:
        """Where a block without references goes: every path to ``FREE`` leads through here.

        With ``back`` it is as old as it was when it left the cache, not the newest there.
        """
        arrays = self.blocks
        node = arrays.node[block]
        if node >= 0 and not self.config.keep_cached_on_gpu and not arrays.pins[block]:
            # Its cells end with the sequence that held them.
            self.forget(block)
            node = -1
        if arrays.epoch[block] > self.retired_epoch:
            arrays.state[block] = DYING
            arrays.dying.append((arrays.epoch[block], block))
        elif arrays.pins[block]:
            if arrays.state[block] != LOADING:
                arrays.state[block] = STORING
        elif node >= 0 and block < arrays.limit:
            arrays.state[block] = CACHED
            if self.config.disk_persists:
                self.fresh_blocks.append(block)
            if back:
                arrays.cached.put_back(block)
            else:
                arrays.cached.push_newest(block)
        else:
            self.forget(block)
            self._free(block)

    def retire(self, epoch: int) -> None:
        """Every step up to ``epoch`` has ended: settle the blocks that waited for them."""
        self.retired_epoch = epoch
        arrays = self.blocks
        waiting = len(arrays.dying)
        for _ in range(waiting):
            until, block = arrays.dying.popleft()
            if arrays.state[block] != DYING or arrays.epoch[block] != until:
                continue  # shared again since, or dying a second time
            if until > epoch:
                arrays.dying.append((until, block))
            else:
                self.settle(block)

    def pin(self, block: int) -> None:
        """One more transfer in flight names the block."""
        self.blocks.pins[block] += 1

    def begin_loading(self, blocks: npt.NDArray[np.int32], transfer: int) -> None:
        """A transfer is going to write ``blocks``, which are distinct."""
        self.blocks.all_pins[blocks] += 1
        self.blocks.states[blocks] = LOADING
        self.loading.update(dict.fromkeys(blocks.tolist(), transfer))

    def unpin(self, block: int, *, back: bool = False) -> None:
        """One transfer less names the block; ``back``: see `settle`."""
        arrays = self.blocks
        arrays.pins[block] -= 1
        if not arrays.pins[block] and not arrays.refcount[block] and arrays.state[block] != DYING:
            self.settle(block, back=back)

    def relocate(self, block: int, epoch: int) -> int:
        """Have a block below the limit take over the references and the page of ``block``.

        Args:
            block: One that sequences hold, from the limit on; there is a block for it.
            epoch: The last step in flight that may touch it, -1 for none.
        """
        arrays = self.blocks
        (target,) = arrays.pop_free(1) or (self._evict_one(),)
        arrays.state[target] = ACTIVE
        arrays.refcount[target], arrays.refcount[block] = arrays.refcount[block], 0
        node = arrays.node[block]
        if node >= 0:
            arrays.node[target], arrays.node[block] = node, -1
            self.index.move(node, Tier.GPU, target)
        arrays.epoch[block] = max(arrays.epoch[block], epoch)
        self.settle(block)
        return target

    def set_limit(self, limit: int) -> None:
        """Use only blocks below ``limit``; cached pages above it are dropped at once."""
        arrays = self.blocks
        for block in arrays.cached:
            if block >= limit:
                arrays.cached.remove(block)
                self.forget(block)
                arrays.state[block] = FREE
        arrays.set_limit(limit)

    # ------------------------------------------------------------------------------- pages

    def register(self, block: int, digest: bytes, before: bytes | None, owner: int) -> None:
        """``block``, which is full and held, may be shared as the page ``digest``.

        Args:
            block: The block.
            digest: Its name.
            before: The name of the page in front of it, None for the first.
            owner: Whose it is, unless it is there already.
        """
        arrays, index = self.blocks, self.index
        node = index.find(digest)
        if node < 0:
            node = index.add_after(digest, before, owner)
        twin = index.where[Tier.GPU][node]
        if twin < 0:
            index.place(node, Tier.GPU, block)
        elif arrays.state[twin] == CACHED:
            # Nobody's table names the twin, so this block can stand for the page instead.
            arrays.cached.remove(twin)
            arrays.node[twin] = -1
            index.move(node, Tier.GPU, block)
            self._free(twin)
        else:
            return  # two running sequences keep a copy each; only one of them is found
        arrays.node[block] = node

    def forget(self, block: int) -> None:
        """``block`` no longer stands for a page, if it did."""
        node = self.blocks.node[block]
        if node >= 0:
            self.blocks.node[block] = -1
            self.index.drop(node, Tier.GPU)

    def disown(self, block: int) -> None:
        """Drop the block's page if nobody needs it, though a store may still be reading it."""
        if block in self.blocks.cached:
            self.blocks.cached.remove(block)
            self.forget(block)
            self._free(block)
        elif self.blocks.state[block] == STORING:
            self.forget(block)

    def below(self, node: int) -> Place | None:
        """Where a page is resident below the first tier, in the fastest tier that has it."""
        if node >= 0:
            for tier in self.lower.values():
                slot = self.index.where[tier.tier][node]
                if slot >= 0:
                    return Place(tier, slot)
        return None

    def take_below(self, owner: int, *, swap: bool, background: bool = False) -> Place | None:
        """A slot for a page of ``owner``, in the fastest tier with room; None if there is none.

        A page is evicted for it only if every tier is full, or it is in another tier too; in
        background, only if no higher tier has it.
        """
        for evict in (Evict.OLD,) if background else (Evict.COPIES, Evict.ANY):
            for tier in self.lower.values():
                slot = tier.take(swap=swap, evict=evict, owner=owner)
                if slot >= 0:
                    return Place(tier, slot)
        return None

    def shrink_caches(self) -> None:
        """Evict what exceeds a tier's share for caching."""
        for tier in self.lower.values():
            tier.shrink_cache()

    def clean(self, block: int) -> bool:
        """Whether the block's page can be loaded from below too."""
        node = self.blocks.node[block]  # asked for each of hundreds of evictions
        slot = self.index.where[Tier.RAM][node]
        if slot >= 0 and self.ram.ready(slot):
            return True
        slot = self.index.where[Tier.DISK][node]
        return slot >= 0 and self.disk.ready(slot)

    def dirty_blocks(self, depth: int, count: int) -> list[int]:
        """Up to ``count`` blocks without a copy below, of the ``depth`` that are evicted next."""
        node = self.blocks.node
        ram, disk = self.index.where[Tier.RAM], self.index.where[Tier.DISK]
        dirty: list[int] = []
        # A cached block has a page. After each event hundreds are looked at, mostly in vain.
        for block in islice(self.blocks.cached, depth):
            page = node[block]
            if ram[page] < 0 and disk[page] < 0:
                dirty.append(block)
                if len(dirty) == count:
                    break
        return dirty

    def begin_write_back(self, block: int) -> None:
        """A cached page is being copied down: its block is not to be had until that has ended."""
        self.blocks.cached.remove(block)
        self.blocks.state[block] = STORING

    # ----------------------------------------------------------------------------- private

    def _free(self, block: int) -> None:
        arrays = self.blocks
        arrays.state[block] = FREE
        if block < arrays.limit:
            arrays.free.append(block)

    def _evict_one(self) -> int:
        """A cached block, rid of its page: oldest leaf first, pages also below before others."""
        cached = self.blocks.cached
        children, node = self.index.children[Tier.GPU], self.blocks.node
        victim = cached.oldest()
        for _ in range(cached.count):
            if not children[node[victim]]:
                break
            # A page that others continue is as recent as they are: to the other end with it.
            cached.remove(victim)
            cached.push_newest(victim)
            victim = cached.oldest()
        if (self.ram.total or self.disk.total) and not self.clean(victim):
            for block in islice(cached, _CLEAN_LOOKAHEAD):
                if not children[node[block]] and self.clean(block):
                    victim = block
                    break
        cached.remove(victim)
        self.forget(victim)
        return victim
