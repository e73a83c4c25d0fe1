"""A device that works as late, or as early, as a real one could, on memory that tells lies at once.

Every cell holds a number that names (root, all tokens up to this position), or rubbish.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from kvpager import Attach, CopyBlock, Grown, Load, Move, PagerConfig, Shrunk, Spill, Store, Tier
from tests.support.pager_models import RUBBISH, Model, StepSim, check


class Device:
    """Steps and copies in order, transfers in any order, and two kinds of memory.

    With ``keep_cached_on_gpu=False`` the second kind works as llama.cpp's: cells belong to
    sequences, and `Attach` and `Store` need a sequence that holds what they name.
    """

    def __init__(self, config: PagerConfig, models: dict[int, Model], rng: random.Random) -> None:
        self.size = config.block_tokens
        self.llama = not config.keep_cached_on_gpu
        self.models = models
        self._rng = rng
        self.memory = [[RUBBISH] * self.size for _ in range(config.gpu_blocks)]
        self.below = {
            Tier.RAM: [[RUBBISH] * self.size for _ in range(config.ram_blocks)],
            Tier.DISK: [[RUBBISH] * self.size for _ in range(config.disk_blocks)],
        }
        self.end = config.gpu_blocks
        """Blocks that have memory."""
        self.cells: dict[int, dict[int, int]] = {}
        self.stored_cells: dict[tuple[Tier, int], list[int]] = {}
        self.queue: list[CopyBlock | StepSim] = []
        """Given to the device, not yet carried out."""
        self.steps: list[StepSim] = []
        """Launched, not retired."""
        self.transfers: dict[int, Store | Load | Spill] = {}
        self.early: set[int] = set()
        """Transfers that are carried out, and not yet reported."""

    def resize(self, change: Grown | Shrunk) -> None:
        """Memory comes, or goes for good: nothing may be left that names it."""
        end = change.gpu_blocks
        if isinstance(change, Grown):
            self.end = max(self.end, end)
            return
        self.flush_copies()
        used = self.named()
        used |= {
            block
            for item in self.queue
            if isinstance(item, CopyBlock)
            for block in (item.src, item.dst)
        }
        used |= {
            page.block
            for item in self.transfers.values()
            if not isinstance(item, Spill)
            for page in item.pages
        }
        late = {block for block in used if block >= end}
        check(not late, f"{change}, while {late} are in use")
        self.end = end
        self.memory[end:] = [[RUBBISH] * self.size for _ in self.memory[end:]]

    def flush_copies(self) -> None:
        """Carry out all copies, and the steps in front of them."""
        copies = [i for i, item in enumerate(self.queue) if isinstance(item, CopyBlock)]
        self.flush(copies[-1] + 1 if copies else 0)

    def there(self, blocks: Iterable[int], what: object) -> None:
        """Check that no block is named whose memory was given back."""
        gone = [block for block in blocks if block >= self.end]
        check(not gone, f"{what} names {gone}, of which the memory was given back")

    def named(self) -> set[int]:
        """Blocks that a step in flight may touch."""
        return {block for step in self.steps for run in step.runs for block in run.table}

    def flush(self, count: int) -> None:
        """The device carries out the next ``count`` things it was given."""
        for item in self.queue[:count]:
            if isinstance(item, CopyBlock):
                self.memory[item.dst] = self.memory[item.src][: item.tokens] + [RUBBISH] * (
                    self.size - item.tokens
                )
            else:
                self.execute(item)
        del self.queue[:count]

    def execute(self, step: StepSim) -> None:
        step.executed = True
        for run in step.runs:
            for position, content in enumerate(run.expected):
                block, offset = run.table[position // self.size], position % self.size
                if position >= run.start:
                    rubbish = run.poisoned or step.fails
                    self.memory[block][offset] = RUBBISH if rubbish else content
                elif not run.poisoned:
                    check(
                        self.memory[block][offset] == content,
                        f"step {step.epoch} reads a wrong position {position} of {run.seq}",
                    )

    def begin(self, what: Store | Load | Spill) -> None:
        if not isinstance(what, Spill):
            self.there((page.block for page in what.pages), what)
        self.transfers[what.transfer] = what
        # Copies that were asked for before come first; steps in flight need not.
        self.flush_copies()
        if isinstance(what, Load):
            named = self.named()
            for page in what.pages:
                check(page.block not in named, f"{what}: a step may touch block {page.block}")
        elif self.llama and isinstance(what, Store):
            self.store_cells(what)
        if self._rng.random() < 0.5:
            self.early.add(what.transfer)
            self.move(what)

    def move(self, what: Store | Load | Spill) -> None:
        if isinstance(what, Spill):
            for move in what.pages:
                self.below[what.target][move.target] = self.below[what.source][move.source][:]
                if self.llama:
                    stored = self.stored_cells[what.source, move.source]
                    self.stored_cells[what.target, move.target] = stored
            return
        below = self.below[what.tier]
        for page in what.pages:
            padding = [RUBBISH] * (self.size - page.tokens)
            if isinstance(what, Store):
                below[page.slot] = self.memory[page.block][: page.tokens] + padding
            else:
                self.memory[page.block] = below[page.slot][: page.tokens] + padding
        if isinstance(what, Load) and self.llama:
            cells = self.cells.setdefault(what.seq, {})
            for page in what.pages:
                start = page.index * self.size
                kept = self.stored_cells.get((what.tier, page.slot))
                check(kept is not None, f"{what}: nothing in slot {page.slot}")
                assert kept is not None
                for offset, content in enumerate(kept[: page.tokens]):
                    cells[start + offset] = content

    # ------------------------------------------------------------------- cells, as llama.cpp's

    def step_cells(self, step: StepSim) -> None:
        for run in step.runs:
            cells = self.cells.setdefault(run.seq, {})
            check(sorted(cells) == list(range(run.start)), f"{run.seq} has cells {sorted(cells)}")
            if not run.poisoned:
                held = [cells[position] for position in range(run.start)]
                check(held == run.expected[: run.start], f"cells of {run.seq}")
            for position in range(run.start, len(run.expected)):
                cells[position] = RUBBISH if step.fails else run.expected[position]

    def attach_cells(self, attach: Attach) -> None:
        target = self.cells.setdefault(attach.seq, {})
        for i, block in enumerate(attach.blocks):
            index = attach.first + i
            start = index * self.size
            end = min(start + self.size, attach.first * self.size + attach.tokens)
            holder = next(
                (
                    model
                    for model in self.models.values()
                    if model.id != attach.seq
                    and model.blocks[index : index + 1] == [block]
                    and all(at in self.cells.get(model.id, {}) for at in range(start, end))
                ),
                None,
            )
            check(holder is not None, f"{attach}: nobody holds block {block}")
            assert holder is not None
            for position in range(start, end):
                target[position] = self.cells[holder.id][position]

    def store_cells(self, store: Store) -> None:
        cells = self.cells.get(store.seq)
        check(cells is not None, f"{store}: the backend has no such sequence")
        assert cells is not None
        for page in store.pages:
            start = page.index * self.size
            held = [cells.get(start + offset) for offset in range(page.tokens)]
            check(None not in held, f"{store}: the sequence does not hold page {page.index}")
            self.stored_cells[store.tier, page.slot] = [item for item in held if item is not None]

    def leave_rubbish(self, what: Store | Load | Spill) -> None:
        """Where a failed transfer was to write."""
        rubbish = [RUBBISH] * self.size
        if isinstance(what, Load):
            for page in what.pages:
                self.memory[page.block] = rubbish[:]
            return
        tier = what.target if isinstance(what, Spill) else what.tier
        for item in what.pages:
            slot = item.target if isinstance(item, Move) else item.slot
            self.below[tier][slot] = rubbish[:]
            self.stored_cells.pop((tier, slot), None)
