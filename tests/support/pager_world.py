"""A caller, a backend, and a memory for the pager, all simulated, that notice every mistake.

`World` drives one pager through a random history, told by a seed. It carries out each instruction
on a memory in which every cell holds a number that names (root, all tokens up to this position),
and checks what each step reads. Work is as late, or as early, as a real device could make it:

* steps and `CopyBlock` run in order, but at any time up to the step's end;
* a `Store` or `Load` runs at any time between the instruction and its report, out of order with
  everything except a copy that was asked for before it, and may fail and leave rubbish behind.

With ``keep_cached_on_gpu=False`` a second memory works as llama.cpp's: cells belong to sequences,
and `Attach` and `Store` need a sequence that holds what they name.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

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
    ImpossibleEventError,
    Instruction,
    Load,
    Move,
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

RUBBISH = -1
WAITING = ("asking", "swapped")
ROOTS = (bytes(range(32)), bytes(range(1, 33)))


class WrongContentError(AssertionError):
    """A cell does not hold what it should, or an instruction cannot be carried out."""


def check(condition: object, what: str) -> None:
    """Raise `WrongContentError` unless ``condition`` holds."""
    if not condition:
        raise WrongContentError(what)


@dataclass
class Launched:
    """A sequence's part of a step in flight."""

    epoch: int
    start: int
    valid: int


@dataclass
class Model:
    """A sequence, as naively as possible."""

    id: int
    root: bytes
    tokens: list[int]
    width: int = 1
    group: int = -1
    status: str = "asking"
    computed: int = 0
    in_flight: list[Launched] = field(default_factory=list)
    kept: bool = False
    """Swapped, and no transfer has failed since."""
    blocks: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = self.width

    @property
    def length(self) -> int:
        return self.computed + sum(item.valid for item in self.in_flight)

    def content(self, end: int) -> list[int]:
        """What the cells of positions ``0 .. end - 1`` must hold."""
        while len(self.contents) < end:
            before = self.contents[-1] if self.contents else int.from_bytes(self.root[:4], "little")
            token = self.tokens[len(self.contents)]
            self.contents.append(hash((before, token)) & 0x7FFFFFFFFFFFFFFF)
        return self.contents[:end]

    def cut(self, length: int) -> None:
        del self.tokens[length:]
        del self.contents[length:]


@dataclass
class RunSim:
    """A sequence's part of a step, as the device sees it."""

    seq: int
    start: int
    table: list[int]
    tokens: list[int]
    expected: list[int]
    """Contents of all positions up to the run's end."""
    poisoned: bool


@dataclass
class StepSim:
    epoch: int
    runs: list[RunSim]
    fails: bool
    executed: bool = False


class World:
    """One random history."""

    def __init__(
        self,
        seed: int,
        make: Callable[[PagerConfig], Pager] = Pager,
        *,
        validate_every: int = 12,
        config: PagerConfig | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.config = config if config is not None else self._random_config()
        self.size = self.config.block_tokens
        self.pager = make(self.config)
        self.llama = not self.config.keep_cached_on_gpu
        self.most_in_flight = 1 if self.llama else 3
        self.validate_every = validate_every
        self.models: dict[int, Model] = {}
        self.memory = [[RUBBISH] * self.size for _ in range(self.config.gpu_blocks)]
        self.below = {
            Tier.RAM: [[RUBBISH] * self.size for _ in range(self.config.ram_blocks)],
            Tier.DISK: [[RUBBISH] * self.size for _ in range(self.config.disk_blocks)],
        }
        self.cells: dict[int, dict[int, int]] = {}
        self.stored_cells: dict[tuple[Tier, int], list[int]] = {}
        self.queue: list[CopyBlock | StepSim] = []
        self.executed = 0
        self.steps: list[StepSim] = []
        self.transfers: dict[int, Store | Load | Spill] = {}
        self.issued_at: dict[int, int] = {}
        self.early: set[int] = set()
        self.short: set[int] = set()
        self.ceilings = dict.fromkeys(ROOTS, 0)
        self.held_before = dict.fromkeys(ROOTS, 0)
        self.events = 0
        self.next_seq = 0
        self.next_epoch = 0
        self.log: list[object] = []
        """Events and instructions, in order."""

    def _random_config(self) -> PagerConfig:
        rng = self.rng
        return PagerConfig(
            gpu_blocks=rng.randint(3, 20),
            ram_blocks=rng.choice((0, 2, 6, 12, 30)),
            disk_blocks=rng.choice((0, 0, 4, 16)),
            block_tokens=rng.choice((1, 2, 4, 4)),
            max_sequences=rng.choice((0, 0, 3, 6)),
            keep_cached_on_gpu=rng.random() < 0.6,
            growth_margin=rng.choice((0.0, 0.1)),
            ram_swap_reserve=rng.choice((0.0, 0.25, 0.5)),
        )

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
            (self.pressure, 1),
            (self.quota, 1),
            (self.impossible, 1),
            (self.idle, 3),
        )
        choices, weights = zip(*rules, strict=True)
        for rule in self.rng.choices(choices, weights, k=events):
            rule()
        self.finish()

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
        named = {block for step in self.steps for run in step.runs for block in run.table}
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
            most = 5 * self.size
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
        self.send(Admit(model.id, tokens, model.root, klass, model.width, model.group))

    def resume(self) -> None:
        model = self.pick("swapped")
        if model is not None:
            self.send(Resume(model.id))

    def step(self) -> None:
        if len(self.steps) >= self.most_in_flight:
            return
        ready = self.of("running")
        chosen = self.rng.sample(ready, self.rng.randint(0, len(ready)))
        counts = []
        for model in chosen:
            known = len(model.tokens) - model.length
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
                for step in self.steps
                for item in model.in_flight
            )
            table = self.pager.block_table(model.id).tolist()
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
        self.steps.append(step)
        self.queue.append(step)
        if self.llama:
            self.step_cells(step)
        self.send(StepLaunched(epoch, ids, counts))

    def check_own(self, model: Model, blocks: list[int]) -> None:
        for other in self.models.values():
            if other is not model and other.status != "asking":
                shared = set(blocks) & set(self.pager.block_table(other.id).tolist())
                check(not shared, f"{model.id} is to write {shared}, which {other.id} holds too")

    def end_step(self) -> None:
        if not self.steps:
            return
        step = self.steps[0]
        self.flush(self.queue.index(step) + 1 if not step.executed else 0)
        self.steps.pop(0)
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
        if not self.transfers:
            return
        transfer = self.rng.choice(list(self.transfers))
        self.report(transfer, ok=self.rng.random() > 0.08)

    def report(self, transfer: int, *, ok: bool) -> None:
        what = self.transfers.pop(transfer)
        if ok:
            if transfer not in self.early:
                self.move(what)
            self.send(TransferDone(transfer))
            return
        self.leave_rubbish(what)
        for model in self.models.values():
            model.kept = False
        self.send(TransferFailed(transfer))

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

    def fork(self) -> None:
        model = self.pick("running")
        if model is None or model.in_flight:
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
        group = self.models[seq].group
        for model in self.of("running", "loading"):
            if model.id == seq or (group >= 0 and model.group == group):
                model.status = "stepping aside"
        self.send(Preempt(seq, self.rng.choice(list(PreemptMode))))

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

    def pressure(self) -> None:
        self.send(Pressure(self.rng.randint(self.config.gpu_blocks // 2, self.config.gpu_blocks)))

    def quota(self) -> None:
        """A namespace is given a quota; whatever then happens, its ceiling holds."""
        root = self.rng.choice(ROOTS)
        floor = self.rng.randint(0, self.config.gpu_blocks // 2)
        ceiling = self.rng.choice((0, self.rng.randint(max(1, floor), self.config.gpu_blocks)))
        self.ceilings[root] = ceiling
        self.send(SetQuota(root, floor, ceiling))

    def idle(self) -> None:
        """The device gets on with its work."""
        self.flush(self.rng.randint(0, len(self.queue)))
        self.pager.stats()

    def impossible(self) -> None:
        """Nonsense is refused, and changes nothing."""
        rng = self.rng
        some = rng.choice([*self.models, 10**6])
        status = self.models[some].status if some in self.models else "unknown"
        nonsense: list[Event] = [
            StepRetired(self.next_epoch, ()),
            StepFailed(self.next_epoch + 1),
            TransferDone(10**6),
            TransferFailed(0),
            Pressure(self.config.gpu_blocks + 1),
            SetQuota(ROOTS[0], 5, 4),
            Fork(10**6, (1,)),
            StepLaunched(self.next_epoch - 5, (), ()),
            Admit(some, np.array([], dtype=np.int32), ROOTS[0]),
        ]
        if status != "running":
            nonsense += [Reserve((some,), (1,)), StepLaunched(self.next_epoch, (some,), (1,))]
        if status in ("asking", "ending", "unknown"):
            nonsense += [Free(some), Truncate(some, 0), Preempt(some), Resume(some)]
        if status == "running":
            nonsense += [
                Resume(some),
                Truncate(some, self.models[some].length + 1),
                Truncate(some, -1),
                StepLaunched(self.next_epoch, (some,), (10**6,)),
                Fork(some, (some,)),
                Reserve((some,), (0,)),
            ]
        before = fingerprint(self.pager)
        event = rng.choice(nonsense)
        try:
            out = self.pager.handle(event)
        except ImpossibleEventError as error:
            check(error.story is not None, "an error without a story")
        else:
            raise WrongContentError(f"{event} was accepted: {out}")
        check(fingerprint(self.pager) == before, f"{event} was refused, but changed something")

    # ------------------------------------------------------------------------------ to the end

    def finish(self) -> None:
        """Every sequence runs to its end, and then nothing is held any more."""
        self.send(Pressure(self.config.gpu_blocks))
        for root in ROOTS:
            self.ceilings[root] = 0
            self.send(SetQuota(root))
        for _ in range(40 + 60 * len(self.models)):
            if not self.models:
                break
            self.one_round()
        self.settle()
        check(not self.models, f"these never end: {list(self.models.values())}")
        self.pager.validate()
        stats = self.pager.stats()
        check(stats.gpu.used == 0, f"blocks still used: {stats.gpu}")
        used = stats.ram.used + stats.disk.used
        check(used == 0, f"slots still used: {stats.ram}, {stats.disk}")
        check(not self.llama or not self.cells, f"the backend still has {list(self.cells)}")

    def settle(self) -> None:
        rounds = 0
        while self.steps or self.transfers:
            rounds += 1
            check(rounds <= 200, "copies in background beget one another for ever")
            while self.steps:
                self.end_step()
            for transfer in list(self.transfers):
                self.report(transfer, ok=True)

    def one_round(self) -> None:
        """What a simple scheduler does."""
        self.settle()
        for model in self.of("running"):
            if model.computed == len(model.tokens):
                self.end(model)
        self.settle()
        for model in [*self.of("swapped"), *self.of("asking")]:
            if model.status == "swapped":
                self.send(Resume(model.id))
            elif model.status == "asking":
                self.ask(model)
        self.settle()
        running = [model for model in self.of("running") if model.computed < len(model.tokens)]
        work = []
        for model in running:
            if model.status != "running":
                continue
            count = len(model.tokens) - model.computed
            self.send(Reserve((model.id,), (count,)))
            if model.id in self.short and count > 1:
                count = 1
                self.send(Reserve((model.id,), (count,)))
            if model.id in self.short and len(self.models) == 1:
                model.cut(model.computed)  # longer than the pool: its caller would end it
            elif model.id in self.short:
                victim = self.pager.choose_victim([item.id for item in self.of("running")])
                if victim is not None:
                    group = self.models[victim].group
                    for item in self.of("running", "loading"):
                        if item.id == victim or (group >= 0 and item.group == group):
                            item.status = "stepping aside"
                    self.send(Preempt(victim))
            else:
                work.append((model, count))
        self.launch([(model, count) for model, count in work if model.status == "running"])

    # ---------------------------------------------------------------------------- instructions

    def apply(self, instruction: Instruction) -> None:
        """Carry out an instruction, or see to it that it is carried out later."""
        if isinstance(instruction, CopyBlock):
            self.queue.append(instruction)
            model = self.models[instruction.seq]
            model.blocks[instruction.index] = instruction.dst
            named = {block for step in self.steps for run in step.runs for block in run.table}
            check(instruction.dst not in named, f"{instruction}: a step may touch its target")
        elif isinstance(instruction, (Store, Load, Spill)):
            self.begin(instruction)
        elif isinstance(instruction, Attach):
            blocks = self.models[instruction.seq].blocks
            end = instruction.first + len(instruction.blocks)
            blocks += [-1] * (end - len(blocks))
            blocks[instruction.first : end] = instruction.blocks
            if self.llama:
                self.attach_cells(instruction)
        elif isinstance(instruction, Reserved):
            self.short = {item.seq for item in instruction.short}
            check(all(item.missing_blocks > 0 for item in instruction.short), "short of nothing")
        elif isinstance(instruction, Trim):
            model = self.models[instruction.seq]
            if model.status in ("loading", "stepping aside", "ending") and not model.in_flight:
                # A load failed; `Runnable` says so when the last of them has ended, if at all.
                model.computed = min(model.computed, instruction.length)
            cells = self.cells.get(instruction.seq, {})
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
                check(instruction.computed <= model.computed, "resumed with more than there was")
                lost = model.kept and instruction.computed != model.computed
                check(not lost, f"{instruction}: it was swapped with {model.computed}")
            model.computed = instruction.computed
            model.status = "loading" if instruction.loading else "running"
        elif isinstance(instruction, Denied):
            blocks = -(-len(model.tokens) // self.size) + 1
            ceiling = self.ceilings[model.root] or self.config.gpu_blocks
            limit = self.config.max_sequences
            fits = blocks <= min(ceiling, self.config.gpu_blocks) and not (
                limit and model.width > limit
            )
            check(not fits, f"{instruction}, though it fits")
            del self.models[model.id]
        elif isinstance(instruction, Runnable):
            check(model.status == "loading", f"{instruction}: it was {model.status}")
            check(instruction.computed <= model.computed, "more was loaded than announced")
            model.computed = instruction.computed
            model.status = "running"
        elif isinstance(instruction, Release):
            self.cells.pop(model.id, None)
            if model.status == "ending":
                del self.models[model.id]
        elif isinstance(instruction, Preempted):
            check(model.status == "stepping aside", f"{instruction}: it was {model.status}")
            check(0 <= instruction.lost <= model.computed, f"{instruction} of {model.computed}")
            model.status = "swapped"
            model.kept = instruction.mode is PreemptMode.SWAP
            model.blocks = []

    # ------------------------------------------------------------------------------ the device

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
        self.executed += count

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
        self.transfers[what.transfer] = what
        # Copies that were asked for before come first; steps in flight need not.
        copies = [i for i, item in enumerate(self.queue) if isinstance(item, CopyBlock)]
        self.flush(copies[-1] + 1 if copies else 0)
        if isinstance(what, Load):
            named = {block for step in self.steps for run in step.runs for block in run.table}
            for page in what.pages:
                check(page.block not in named, f"{what}: a step may touch block {page.block}")
        elif self.llama and isinstance(what, Store):
            self.store_cells(what)
        if self.rng.random() < 0.5:
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


def fingerprint(pager: Pager) -> list[object]:
    """Everything a pager is made of, stories aside."""
    pool, seqs, transfers = pager._pool, pager._seqs, pager._transfers
    arrays = pool.blocks
    seen: list[object] = [
        arrays.limit,
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
