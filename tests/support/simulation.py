"""The engine in simulated time: real scheduler and pager, the simulated backend, scripted apps.

Nothing here reads a clock or draws without the seed, so a run is named by its seed and replays.
`seeds` gives a test its seeds and says how to replay the one that failed::

    @pytest.mark.parametrize("seed", seeds(20))
    def test_something(seed: int) -> None:
        world = World(seed)
        app = world.app("editor", klass=PriorityClass.INTERACTIVE)
        app.submit(prompt=100, max_tokens=10, then=lambda done: ...)
        world.run(30.0)
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kvpager.types import PriorityClass
from pagedd_daemon import messages as m
from pagedd_daemon.backends.base import Capabilities
from pagedd_daemon.backends.simulated import BYTES_PER_TOKEN, SimulatedBackend
from pagedd_daemon.engine.core import Engine
from pagedd_daemon.engine.fairness import WINDOW_S, Flow
from pagedd_daemon.params import SamplingParams, StopParams

_NAP_S = 0.001
"""Simulated seconds until a transfer is looked at again when nobody can run."""


def seeds(count: int) -> list[int]:
    """Seeds 0 to ``count``, or the one of ``PAGEDD_SEED``."""
    one = os.environ.get("PAGEDD_SEED")
    return [int(one)] if one else list(range(count))


@dataclass(slots=True, eq=False)
class Job:
    """One request, from its submission to its end."""

    app: App
    rid: int
    prompt_tokens: int
    max_tokens: int
    submitted_s: float
    first_s: float | None = None
    ended_s: float | None = None
    samples: int = 1
    tokens: int = 0
    """Generated, over all samples."""
    reasons: list[str] = field(default_factory=list)
    """Why its samples ended; an error's code if it was rejected."""
    cached_tokens: int = 0
    then: Callable[[Job], None] | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        assert self.first_s is not None, f"{self.app.key} had no token of request {self.rid}"
        return self.first_s - self.submitted_s


class App:
    """An app as the engine sees it."""

    def __init__(self, world: World, message: m.App, klass: PriorityClass) -> None:
        self.world = world
        self.message = message
        self.klass = klass
        self.jobs: list[Job] = []

    @property
    def key(self) -> str:
        """What the engine calls it."""
        return self.message.key

    def submit(
        self,
        *,
        prompt: int | Sequence[int],
        max_tokens: int,
        n: int = 1,
        klass: PriorityClass | None = None,
        then: Callable[[Job], None] | None = None,
    ) -> Job:
        """Send a request: a prompt of so many random ids, or these; ``then`` is called at its
        end."""
        world = self.world
        ids = world.ids(prompt) if isinstance(prompt, int) else list(prompt)
        rid = next(world.numbers)
        job = Job(self, rid, len(ids), max_tokens, world.now, samples=n, then=then)
        if not any(j.ended_s is None for j in self.jobs):
            world.engine.handle(self.message)
        self.jobs.append(job)
        world.jobs[rid] = job
        stop = StopParams(max_tokens=max_tokens, ignore_eos=True)
        sampling = SamplingParams(temperature=0.8 if n > 1 else 0.0, seed=rid)
        world.engine.handle(
            m.Submit(
                rid=rid,
                app=self.key,
                klass=int(self.klass if klass is None else klass),
                root=self.message.root,
                prompt=np.asarray(ids, dtype="<i4").tobytes(),
                n=n,
                sampling={name: getattr(sampling, name) for name in sampling.__slots__},
                stop={name: getattr(stop, name) for name in stop.__slots__},
            )
        )
        return job

    def cancel(self, job: Job) -> None:
        """End a request now."""
        self.world.engine.handle(m.Cancel(job.rid))

    def pause(self, job: Job) -> None:
        """Its client does not read."""
        self.world.engine.handle(m.Pause(job.rid))

    def ended(self) -> list[Job]:
        """Requests that are over."""
        return [job for job in self.jobs if job.ended_s is not None]


class World:
    """Time, the engine, and what is going to happen."""

    def __init__(
        self,
        seed: int,
        *,
        kv_tokens: int = 8192,
        ram_tokens: int = 1 << 17,
        step_s: float = 0.008,
        token_s: float = 0.001,
        validate_every: int = 64,
        write_through: bool = False,
        **capabilities: object,
    ) -> None:
        """An idle engine at time 0.

        Args:
            seed: Of everything random.
            kv_tokens: Of the first tier.
            ram_tokens: Of the RAM tier.
            step_s: Seconds of a step beside its tokens.
            token_s: Seconds for each input token of a step.
            validate_every: Steps between two checks of the pager's invariants.
            write_through: As of `Engine`.
            capabilities: Fields of `Capabilities` that shall differ from the simulated backend's;
                one step is in flight at a time unless they say otherwise.
        """
        print(f"replay with PAGEDD_SEED={seed}")
        self.dice = random.Random(seed)
        self.now = 0.0
        self.numbers = itertools.count(1)
        self.jobs: dict[int, Job] = {}
        self.charges: list[tuple[float, Flow, float]] = []
        """When, whom and how much, of every charge and refund."""
        configure = m.Configure(
            backend="simulated",
            model_path="",
            model_digest=bytes(32),
            context_tokens=0,
            kv_tokens=kv_tokens,
            ram_bytes=ram_tokens * BYTES_PER_TOKEN,
            threads=1,
            vocab_size=258,
            eog_tokens=(256,),
        )
        made = SimulatedBackend.from_configure(configure).capabilities
        changed: dict[str, object] = {"asynchronous": False, **capabilities}
        caps: Capabilities = replace(made, **changed)  # type: ignore[arg-type]
        self.backend = SimulatedBackend(
            caps, step_s=step_s, token_s=token_s, clock=lambda: self.now, wait=self._wait
        )
        self.engine = Engine(self.backend, lambda: self.now, write_through=write_through)
        self.steps = 0
        self._validate_every = validate_every
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._watch_charges()

    def _watch_charges(self) -> None:
        fair = self.engine._scheduler.turns.fair
        charge = fair.charge

        def logged(flow: Flow, tokens: float, now: float) -> None:
            self.charges.append((self.now, flow, tokens))
            charge(flow, tokens, now)

        fair.charge = logged  # type: ignore[method-assign]

    def _wait(self, moment: float) -> None:
        self.now = max(self.now, moment)

    # ------------------------------------------------------------------------------------- script

    def app(
        self,
        name: str,
        *,
        klass: PriorityClass = PriorityClass.NORMAL,
        scope: str = "",
        uid: int = 1000,
        weight: float = 1.0,
        max_running: int = 0,
        kv_floor: int = 0,
        kv_ceiling: int = 0,
    ) -> App:
        """An app with a namespace of its own; without ``scope`` with an executable of its own."""
        scope = scope or f"/bin/{name}"
        key = f"{uid} {scope} {name}"
        message = m.App(
            key=key,
            uid=uid,
            scope=scope,
            name=name,
            weight=weight,
            max_running=max_running,
            kv_floor_tokens=kv_floor,
            kv_ceiling_tokens=kv_ceiling,
            root=key.encode().ljust(32, b"\0")[:32],
            owner=uid,
        )
        return App(self, message, klass)

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Call ``what`` when the clock has reached ``when``."""
        heapq.heappush(self._agenda, (when, next(self._order), what))

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Call ``what`` in so many seconds."""
        self.at(self.now + seconds, what)

    def ids(self, count: int) -> list[int]:
        """Random token ids."""
        return [self.dice.randrange(256) for _ in range(count)]

    # ---------------------------------------------------------------------------------------- run

    def run(self, until: float = float("inf")) -> None:
        """Let time pass until ``until``, or until nothing more will happen."""
        stuck = 0
        while self.now < until:
            while self._agenda and self._agenda[0][0] <= self.now:
                heapq.heappop(self._agenda)[2]()
            if self.engine.step(self._take):
                stuck = 0
                self.steps += 1
                if self.steps % self._validate_every == 0:
                    self.engine.validate()
            elif self._agenda and not self.engine.transfers_in_flight:
                self.now = max(self.now, min(until, self._agenda[0][0]))
            elif self.engine.has_work:
                stuck += 1
                assert stuck < 10_000, "requests live and nobody can run"
                self.now += _NAP_S
            else:
                break
        self.engine.validate()

    def _take(self, report: m.StepReport) -> None:
        for output in report.outputs:
            job = self.jobs[output.rid]
            job.tokens += len(output.tokens) // 4
            if job.first_s is None:
                job.first_s = self.now
        for rid, cached in report.started:
            self.jobs[rid].cached_tokens = cached
        for ended in report.ended:
            self.jobs[ended.rid].reasons.append(ended.reason)
        for closed in report.closed:
            self._over(self.jobs[closed.rid])
        for rejected in report.rejected:
            self.jobs[rejected.rid].reasons.append(rejected.code)
            self._over(self.jobs[rejected.rid])

    def _over(self, job: Job) -> None:
        job.ended_s = self.now
        if job.then is not None:
            self.after(0.0, lambda: job.then(job) if job.then else None)

    # -------------------------------------------------------------------------------------- looks

    def served(self, begin: float, end: float) -> dict[str, float]:
        """Charged tokens by name of the app."""
        sums: dict[str, float] = defaultdict(float)
        for at, flow, tokens in self.charges:
            if begin < at <= end:
                sums[flow.app.name] += tokens
        return sums

    def windows(self, begin: float, end: float, every: float = 0.25) -> list[dict[str, float]]:
        """`served` in every `WINDOW_S` seconds between ``begin`` and ``end``."""
        count = int((end - begin - WINDOW_S) / every) + 1
        return [self.served(begin + i * every, begin + i * every + WINDOW_S) for i in range(count)]

    def largest_chunk(self, begin: float) -> float:
        """The most that one step charged one app after ``begin``."""
        return max(tokens for at, _, tokens in self.charges if at >= begin)

    @property
    def preemptions(self) -> int:
        """Sequences paged out so far."""
        stats = self.engine._pool.pager.stats()
        return stats.preemptions_swap + stats.preemptions_recompute


def p95(values: Sequence[float]) -> float:
    """The nearest rank: the least value that 95 % are no greater than."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * 95 // 100) - 1)]
