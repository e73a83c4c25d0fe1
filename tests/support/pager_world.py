"""A caller, a backend, and a memory for the pager, all simulated, that notice every mistake.

`World` drives one pager through a random history, told by a seed. It carries out each instruction
on a `Device` in which every cell holds a number that names (root, all tokens up to this position),
and checks what each step reads. Work is as late, or as early, as a real device could make it:

* steps and `CopyBlock` run in order, but at any time up to the step's end;
* a `Store` or `Load` runs at any time between the instruction and its report, out of order with
  everything except a copy that was asked for before it, and may fail and leave rubbish behind.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from kvpager import (
    Admit,
    Admitted,
    Attach,
    CopyBlock,
    Deferred,
    Denied,
    Event,
    Fork,
    Free,
    Grown,
    Instruction,
    Load,
    Pager,
    PagerConfig,
    Preempt,
    Preempted,
    PreemptMode,
    Pressure,
    PriorityClass,
    Release,
    Reserve,
    Reserved,
    Resume,
    Runnable,
    SetQuota,
    Shrunk,
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
from tests.support.pager_device import Device
from tests.support.pager_ending import Ending
from tests.support.pager_models import ROOTS, WAITING, Launched, Model, RunSim, StepSim, check
from tests.support.pager_nonsense import nonsense_for, refused


class World:
    """One random history."""

    def __init__(
        self,
        seed: int,
        make: Callable[[PagerConfig], Pager] = Pager,
        *,
        validate_every: int = 12,
        config: PagerConfig | None = None,
        swapping: bool = False,
    ) -> None:
        self.rng = random.Random(seed)
        self.swapping = swapping or (config is None and self.rng.random() < 0.2)
        """A history of a few long sequences that take turns in a pool which is too small."""
        self.config = config if config is not None else self._random_config()
        self.size = self.config.block_tokens
        self.pager = make(self.config)
        if self.swapping or self.rng.random() < 0.5:
            self.measure()
        self.llama = not self.config.keep_cached_on_gpu
        self.most_in_flight = 1 if self.llama else 3
        self.validate_every = validate_every
        self.models: dict[int, Model] = {}
        self.device = Device(self.config, self.models, self.rng)
        self.short: set[int] = set()
        self.ceilings = dict.fromkeys(ROOTS, 0)
        self.held_before = dict.fromkeys(ROOTS, 0)
        self.events = 0
        self.next_seq = 0
        self.next_epoch = 0
        self.jumps = 0
        """Times that a sequence computed up to what had been loaded, and went on behind it."""
        self.log: list[object] = []
        """Events and instructions, in order."""

    def _random_config(self) -> PagerConfig:
        rng = self.rng
        if self.swapping:
            return PagerConfig(
                gpu_blocks=rng.randint(6, 14),
                ram_blocks=rng.choice((4, 40)),
                disk_blocks=rng.choice((0, 40)),
                disk_persists=rng.random() < 0.3,
                block_tokens=rng.choice((1, 2)),
                growth_margin=0.0,
            )
        return PagerConfig(
            gpu_blocks=rng.randint(3, 20),
            ram_blocks=rng.choice((0, 2, 6, 12, 30)),
            disk_blocks=rng.choice((0, 0, 4, 16)),
            disk_persists=rng.random() < 0.3,
            block_tokens=rng.choice((1, 2, 4, 4)),
            max_sequences=rng.choice((0, 0, 3, 6)),
            keep_cached_on_gpu=rng.random() < 0.6,
            growth_margin=rng.choice((0.0, 0.1)),
            ram_swap_reserve=rng.choice((0.0, 0.25, 0.5)),
            write_through=rng.random() < 0.4,
        )

    def measure(self) -> None:
        """Rates at which everything that the pager may decide by cost is worth while at times."""
        rates = [10.0 ** self.rng.uniform(1, 2) for _ in range(5)]
        self.pager.observe(prefill_tokens_per_s=rates[0])
        for tier, load, store in ((Tier.RAM, *rates[1:3]), (Tier.DISK, *rates[3:])):
            self.pager.observe(load_tokens_per_s=load, store_tokens_per_s=store, tier=tier)

    # ------------------------------------------------------------------------------- history

    def run(self, events: int) -> None:
        """Let ``events`` things happen, then bring everything to an end."""
        rules = (
            (self.admit, 10),
            (self.step, 24),
            (self.end_step, 20),
            (self.end_transfer, 10),
            (self.fork, 4),
            (self.truncate, 4),
            (self.preempt, 5),
            (self.resume, 9),
            (self.free, 6),
            (self.pressure, 2),
            (self.quota, 1),
            (self.impossible, 1),
            (self.idle, 3),
            (self.flood, 8 if self.swapping else 0),
        )
        choices, weights = zip(*rules, strict=True)
        for rule in self.rng.choices(choices, weights, k=events):
            rule()
        Ending(self).finish()

    def send(self, event: Event) -> list[Instruction]:
        """Hand an event to the pager, carry out what it says, and compare it with the models."""
        self.log.append(event)
        self.events += 1
        out = self.pager.handle(event)
        for instruction in out:
            self.log.append(instruction)
            self.apply(instruction)
        self.compare()
        if self.events % self.validate_every == 0:
            self.pager.validate()
        return out

    def compare(self) -> None:
        """Lengths as the models have them; no block handed out that a step may touch."""
        named = self.device.named()
        for model in self.models.values():
            if model.status == "asking":
                continue
            check(self.pager.computed(model.id) == model.computed, f"computed of {model.id}")
            check(self.pager.length(model.id) == model.length, f"length of {model.id}")
            table = self.pager.block_table(model.id).tolist()
            if table != model.blocks:
                fresh = set(table) - set(model.blocks)
                check(not fresh & named, f"{model.id} got {fresh & named}, which a step uses")
                model.blocks = table
        for root, ceiling in self.ceilings.items():
            held = self.pager.namespace_blocks(root)
            before, self.held_before[root] = self.held_before[root], held
            # A sequence may come back alone to a namespace whose ceiling was lowered meanwhile.
            check(not ceiling or held <= max(ceiling, before) or not before, "over the ceiling")
        limit = self.config.max_sequences
        check(not limit or self.ids_used() <= limit, f"{self.ids_used()} sequence ids of {limit}")

    def ids_used(self) -> int:
        running = (model for model in self.models.values() if model.status not in WAITING)
        return sum(model.ids for model in running)

    def of(self, *statuses: str) -> list[Model]:
        return [model for model in self.models.values() if model.status in statuses]

    def pick(self, *statuses: str) -> Model | None:
        found = self.of(*statuses)
        return self.rng.choice(found) if found else None

    # --------------------------------------------------------------------------------- rules

    def admit(self) -> None:
        rng = self.rng
        model = self.pick("asking")
        if model is None or rng.random() < 0.5:
            others = list(self.models.values())
            tokens: list[int] = []
            if others and rng.random() < 0.7:
                source = rng.choice(others).tokens
                tokens = source[: rng.randint(0, len(source))]
            most = (self.config.gpu_blocks - 3 if self.swapping else 5) * self.size
            tokens += [rng.randint(0, 1) for _ in range(rng.randint(0 if tokens else 1, most))]
            model = Model(
                self.next_seq,
                ROOTS[rng.random() < 0.2],
                tokens,
                width=rng.choice((1, 1, 1, 2, 3)),
                group=rng.choice((-1, -1, self.next_seq)),
            )
            self.next_seq += 1
            self.models[model.id] = model
        self.ask(model)

    def ask(self, model: Model) -> None:
        tokens = np.array(model.tokens, dtype=np.int32)
        klass = PriorityClass(self.rng.randrange(3))
        self.send(
            Admit(
                model.id, tokens, model.root, klass, model.width, model.group, owner=model.root[-1]
            )
        )

    def resume(self) -> None:
        model = self.pick("swapped")
        if model is not None:
            self.send(Resume(model.id))

    def step(self) -> None:
        if len(self.device.steps) >= self.most_in_flight:
            return
        ready = [m for m in self.of("running") if m.until < 0 or m.length < m.until]
        chosen = self.rng.sample(ready, self.rng.randint(0, len(ready)))
        counts = []
        for model in chosen:
            known = model.known()
            counts.append(
                self.rng.randint(1, known) if known > 0 else self.rng.choice((1, 1, 1, 2))
            )
        self.send(Reserve(tuple(model.id for model in chosen), tuple(counts)))
        if self.rng.random() < 0.1:
            return  # a caller may change its mind between the two
        work = zip(chosen, counts, strict=True)
        self.launch([(model, n) for model, n in work if model.id not in self.short])

    def launch(self, work: list[tuple[Model, int]]) -> None:
        fails = self.rng.random() < 0.04
        runs = []
        for model, count in work:
            start = model.length
            while len(model.tokens) < start + count:
                model.tokens.append(self.rng.randint(0, 1))
            poisoned = any(
                step.fails and item.epoch == step.epoch and item.valid and item.start < start
                for step in self.device.steps
                for item in model.in_flight
            )
            table = self.pager.block_table(model.id).tolist()
            del table[-(-(start + count) // self.size) :]
            self.device.there(table, f"the next step of {model.id}")
            self.check_own(model, table[start // self.size : -(-(start + count) // self.size)])
            tokens = model.tokens[start : start + count]
            expected = model.content(start + count)
            runs.append(RunSim(model.id, start, table, tokens, expected, poisoned))
        ids, counts = tuple(model.id for model, _ in work), tuple(count for _, count in work)
        epoch = self.next_epoch
        self.next_epoch += self.rng.randint(1, 2)
        for model, count in work:
            model.in_flight.append(Launched(epoch, model.length, count))
        step = StepSim(epoch, runs, fails)
        self.device.steps.append(step)
        self.device.queue.append(step)
        if self.llama:
            self.device.step_cells(step)
        self.send(StepLaunched(epoch, ids, counts))

    def check_own(self, model: Model, blocks: list[int]) -> None:
        for other in self.models.values():
            if other is not model and other.status != "asking":
                shared = set(blocks) & set(self.pager.block_table(other.id).tolist())
                check(not shared, f"{model.id} is to write {shared}, which {other.id} holds too")

    def end_step(self) -> None:
        if not self.device.steps:
            return
        step = self.device.steps[0]
        self.device.flush(self.device.queue.index(step) + 1 if not step.executed else 0)
        self.device.steps.pop(0)
        if step.fails:
            for run in step.runs:
                self.undo(self.models[run.seq], step.epoch)
            self.send(StepFailed(step.epoch))
            return
        for run in step.runs:
            model = self.models[run.seq]
            item = next(item for item in model.in_flight if item.epoch == step.epoch)
            model.in_flight.remove(item)
            model.computed += item.valid
        tokens = tuple(np.array(run.tokens, dtype=np.int32) for run in step.runs)
        self.send(StepRetired(step.epoch, tokens))

    def undo(self, model: Model, epoch: int) -> None:
        item = next(item for item in model.in_flight if item.epoch == epoch)
        model.in_flight.remove(item)
        if item.valid:
            for later in model.in_flight:
                later.valid = 0

    def end_transfer(self) -> None:
        if not self.device.transfers:
            return
        transfer = self.rng.choice(list(self.device.transfers))
        self.report(transfer, ok=self.rng.random() > 0.08)

    def report(self, transfer: int, *, ok: bool) -> None:
        what = self.device.transfers.pop(transfer)
        if ok:
            if transfer not in self.device.early:
                self.device.move(what)
            self.send(TransferDone(transfer))
            return
        self.device.leave_rubbish(what)
        for model in self.models.values():
            model.kept = False
        self.send(TransferFailed(transfer))

    def fork(self) -> None:
        model = self.pick("running")
        if model is None or model.in_flight or model.computed == model.until:
            return
        count = self.rng.randint(1, 2)
        allotted = min(count, model.ids - 1)
        limit = self.config.max_sequences
        if limit and self.ids_used() + count - allotted > limit:
            return
        children = []
        for _ in range(count):
            shared = model.tokens[: model.computed]
            child = Model(self.next_seq, model.root, shared, group=model.group)
            child.status, child.computed = "running", model.computed
            self.next_seq += 1
            self.models[child.id] = child
            children.append(child.id)
        model.ids -= allotted
        self.send(Fork(model.id, tuple(children)))

    def truncate(self) -> None:
        model = self.pick("running", "swapped")
        if model is None:
            return
        length = self.rng.randint(0, model.length)
        for item in model.in_flight:
            item.valid = min(item.valid, max(0, length - item.start))
        model.computed = min(model.computed, length)
        model.until = -1
        model.cut(length)
        if not model.tokens:
            model.tokens = [self.rng.randint(0, 1)]
        self.send(Truncate(model.id, length))

    def preempt(self) -> None:
        candidates = [model.id for model in self.of("running", "loading")]
        if not candidates:
            return
        seq = self.rng.choice(candidates)
        if self.rng.random() < 0.5:
            chosen = self.pager.choose_victim(candidates)
            if chosen is None:
                return
            seq = chosen
        self.step_aside(seq)
        self.send(Preempt(seq, self.rng.choice(list(PreemptMode))))

    def step_aside(self, seq: int) -> None:
        """It is being preempted, with its group."""
        group = self.models[seq].group
        for model in self.of("running", "loading"):
            if model.id == seq or (group >= 0 and model.group == group):
                model.status = "stepping aside"

    def free(self) -> None:
        model = self.pick("running", "loading", "swapped", "stepping aside")
        if model is not None:
            self.end(model)

    def end(self, model: Model) -> None:
        swapped = model.status == "swapped"
        model.status = "ending"
        if swapped:
            del self.models[model.id]
        self.send(Free(model.id, cache=self.rng.random() < 0.85))

    def flood(self) -> None:
        """All step aside for somebody who needs most of the pool, and must be loaded after that."""
        while self.device.steps:
            self.end_step()
        for model in self.of("running"):
            if model.status == "running":
                self.step_aside(model.id)
                self.send(Preempt(model.id, PreemptMode.SWAP))
        for transfer in list(self.device.transfers):
            self.report(transfer, ok=True)
        tokens = [self.rng.randint(2, 9) for _ in range((self.config.gpu_blocks - 1) * self.size)]
        model = Model(self.next_seq, ROOTS[0], tokens)
        self.next_seq += 1
        self.models[model.id] = model
        self.ask(model)
        if model.status == "running":
            self.send(Reserve((model.id,), (model.known(),)))
            if model.id not in self.short:
                self.launch([(model, model.known())])
                self.end_step()
            self.end(model)
        elif model.status == "asking":
            self.models.pop(model.id, None)  # it may have been denied
        for _ in range(2):
            self.resume()

    def pressure(self) -> None:
        total = self.config.gpu_blocks
        self.send(Pressure(self.rng.randint(self.rng.choice((1, total // 2)), total)))
        if self.rng.random() < 0.5:
            self.give_way()

    def give_way(self) -> None:
        """Preempt until what is taken away has somewhere to go."""
        while self.pager.excess():
            running = [model.id for model in self.of("running")]
            if not running:
                break
            seq = self.pager.choose_victim(running) or running[0]
            self.step_aside(seq)
            self.send(Preempt(seq))

    def quota(self) -> None:
        """A namespace is given a quota; whatever then happens, its ceiling holds."""
        root = self.rng.choice(ROOTS)
        floor = self.rng.randint(0, self.config.gpu_blocks // 2)
        ceiling = self.rng.choice((0, self.rng.randint(max(1, floor), self.config.gpu_blocks)))
        self.ceilings[root] = ceiling
        self.send(SetQuota(root, floor, ceiling))

    def impossible(self) -> None:
        """Nonsense is refused, and changes nothing."""
        refused(self.pager, self.rng.choice(nonsense_for(self)))

    def idle(self) -> None:
        """The device gets on with its work."""
        self.device.flush(self.rng.randint(0, len(self.device.queue)))
        self.pager.stats()

    # ---------------------------------------------------------------------------- instructions

    def apply(self, instruction: Instruction) -> None:
        """Carry out an instruction, or see to it that it is carried out later."""
        if isinstance(instruction, (Grown, Shrunk)):
            self.device.resize(instruction)
        elif isinstance(instruction, CopyBlock):
            self.device.there((instruction.dst,), instruction)
            self.device.queue.append(instruction)
            model = self.models[instruction.seq]
            model.blocks[instruction.index] = instruction.dst
            named = self.device.named()
            check(instruction.dst not in named, f"{instruction}: a step may touch its target")
        elif isinstance(instruction, (Store, Load, Spill)):
            self.device.begin(instruction)
        elif isinstance(instruction, Attach):
            self.device.there(instruction.blocks, instruction)
            blocks = self.models[instruction.seq].blocks
            end = instruction.first + len(instruction.blocks)
            blocks += [-1] * (end - len(blocks))
            blocks[instruction.first : end] = instruction.blocks
            if self.llama:
                self.device.attach_cells(instruction)
        elif isinstance(instruction, Reserved):
            self.short = {item.seq for item in instruction.short}
            check(all(item.missing_blocks > 0 for item in instruction.short), "short of nothing")
        elif isinstance(instruction, Trim):
            model = self.models[instruction.seq]
            if model.status in ("loading", "stepping aside", "ending") and not model.in_flight:
                # A load failed; `Runnable` says so when the last of them has ended, if at all.
                model.computed = min(model.computed, instruction.length)
            cells = self.device.cells.get(instruction.seq, {})
            for position in [position for position in cells if position >= instruction.length]:
                del cells[position]
        else:
            self.verdict(instruction)

    def verdict(self, instruction: Instruction) -> None:
        assert isinstance(instruction, (Admitted, Deferred, Denied, Runnable, Preempted, Release))
        model = self.models[instruction.seq]
        if isinstance(instruction, Admitted):
            check(model.status in ("asking", "swapped"), f"{instruction}: it was {model.status}")
            if model.status == "asking":
                check(instruction.computed < len(model.tokens), "the last token is always computed")
            else:
                most = max(model.computed, len(model.tokens) - 1)
                check(instruction.computed <= most, "resumed with more than there was")
                lost = model.kept and instruction.computed < model.computed
                lost = lost and instruction.until < 0
                check(not lost, f"{instruction}: it was swapped with {model.computed}")
            model.computed, model.until = instruction.computed, instruction.until
            model.status = "loading" if instruction.loading else "running"
        elif isinstance(instruction, Denied):
            blocks = -(-len(model.tokens) // self.size) + model.width
            ceiling = self.ceilings[model.root] or self.config.gpu_blocks
            limit = self.config.max_sequences
            fits = blocks <= min(ceiling, self.config.gpu_blocks) and not (
                limit and model.width > limit
            )
            check(not fits, f"{instruction}, though it fits")
            del self.models[model.id]
        elif isinstance(instruction, Runnable):
            if model.until < 0:
                check(model.status == "loading", f"{instruction}: it was {model.status}")
                check(instruction.computed <= model.computed, "more was loaded than announced")
            else:
                check(model.status == "running", f"{instruction}: it was {model.status}")
                check(model.computed == model.until, f"{instruction}, at {model.computed}")
                check(instruction.computed >= model.until, f"{instruction} goes back")
                self.jumps += instruction.computed > model.until
            model.computed, model.until = instruction.computed, instruction.until
            model.status = "running"
        elif isinstance(instruction, Release):
            self.device.cells.pop(model.id, None)
            if model.status == "ending":
                del self.models[model.id]
        elif isinstance(instruction, Preempted):
            check(model.status == "stepping aside", f"{instruction}: it was {model.status}")
            check(0 <= instruction.lost <= model.computed, f"{instruction} of {model.computed}")
            model.status = "swapped"
            model.kept = instruction.mode is PreemptMode.SWAP
            model.until = -1
            model.blocks = []
