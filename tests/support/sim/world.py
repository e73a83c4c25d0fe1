"""One world: what its seed decides, what goes wrong in it, and what must be true at its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from dataclasses import replace

from pagedd_daemon.backends.simulated import BLOCK_TOKENS
from pagedd_daemon.backends.simulated_faults import Faults
from pagedd_daemon.front.apps import Apps
from pagedd_daemon.front.config_model import AppSettings, ConfigFile, UnknownApps
from pagedd_daemon.front.identity import Program
from pagedd_daemon.front.limits import DEFAULT_LIMITS
from pagedd_daemon.front.models import LOAD_MOST_S, State
from pagedd_daemon.front.service import FrontService
from tests.support.front import FakeEntry
from tests.support.sim.asked import Asked, promise
from tests.support.sim.client import Client
from tests.support.sim.engine import Plan, SimEngine
from tests.support.sim.loop import StandstillError, VirtualLoop
from tests.support.sim.oracle import Oracle
from tests.support.sim.script import Habits, Script
from tests.support.sim.source import Shape, SimSource
from tests.support.sim.transport import SimTransport

_LIMITS = replace(
    DEFAULT_LIMITS,
    output_bytes_per_connection=600,
    requests_per_connection=20,
    sessions_per_connection=4,
)
_APPS = ("editor", "chat", "agent", "batch")
_CLASSES = ("interactive", "normal", "background")


class World:
    """Everything that the seed has drawn."""

    def __init__(self, seed: int, oracle: Oracle) -> None:
        self.seed = seed
        self.dice = dice = random.Random(seed)
        self.loop = VirtualLoop()
        self.faults = Faults()
        self.deaths = dice.choice((0, 0, 0, 1, 1, 2, 4))
        self.step_faults = dice.random() < 0.1
        self.bad_loads = 0.2 if dice.random() < 0.1 else 0.0
        self.draining: asyncio.Task[None] | None = None
        """Since somebody asked the daemon to end."""
        self.defeated = self.struck_loading = False
        self.asynchronous = dice.random() < 0.5
        self.keeps = self.asynchronous or dice.random() < 0.5
        shape = Shape(
            kv_blocks=dice.choice((12, 16, 24, 64)),
            ram_pages=dice.choice((0, 4, 16, 64)),
            write_through=dice.random() < 0.5,
            disk_pages=dice.choice((0, 0, 0, 8, 64)),
            disk_persists=dice.random() < 0.5,
            disk_failing=dice.choice((0.0, 0.0, 0.02)),
            disk_corrupt=dice.choice((0.0, 0.0, 0.2)),
        )
        self.source = SimSource(self.loop, dice, shape, self._plan, self._look)
        self.source.helper.failing = dice.choice((0.0, 0.0, 0.0, 0.1))
        self.source.not_started = self.bad_loads / 2
        self.transport = SimTransport(self.loop, dice, _LIMITS)
        self.config = self._config()
        self.apps = Apps(self.config, secret=bytes(32))
        self.oracle = oracle
        self.service: FrontService
        self.clients: list[Client] = []
        self.steps = 0
        self.log: list[str] = []
        """What has happened, in order."""
        self.seen: Counter[str] = Counter()
        """How requests have ended, and what happened meanwhile."""

    # -------------------------------------------------------------------------------- what it is

    def _config(self) -> ConfigFile:
        dice = self.dice
        apps = {}
        if dice.random() < 0.5:
            settings = {
                "class": dice.choice(_CLASSES),
                "weight": dice.choice((0.5, 1.0, 3.0)),
                "max_running": dice.choice((0, 1, 2)),
                "max_queued": dice.choice((0, 0, 3)),
                "kv_floor": dice.choice((0, 0, 64)),
                "kv_ceiling": dice.choice((0, 0, 160)),
            }
            apps["agent"] = AppSettings.model_validate(settings)
        if dice.random() < 0.3:
            apps["batch"] = AppSettings.model_validate({"share": "us", "max_running": 2})
            apps["chat"] = AppSettings.model_validate({"share": "us"})
        unknown = UnknownApps.model_validate({"interactive_samples": dice.choice((0, 2))})
        return ConfigFile(apps=apps, unknown=unknown)

    def _plan(self) -> Plan:
        dice = self.dice
        return Plan(
            load_s=dice.random() * 0.1,
            step_s=dice.choice((0.001, 0.004, 0.02)),
            token_s=dice.choice((0.0, 0.0001)),
            delay_s=dice.choice((0.0, 0.001, 0.01)),
            asynchronous=self.asynchronous,
            keep_cached_on_gpu=self.keeps,
            faults=self._engine_faults(),
            dies_loading=dice.random() < self.bad_loads,
            refuses=dice.random() < self.bad_loads / 4,
        )

    def _engine_faults(self) -> Faults:
        dice = self.dice
        faults = Faults(delay_polls=dice.choice((0, 0, 1, 5)))
        if dice.random() < 0.3:
            faults.transfers = set(dice.sample(range(40), 12))
        if self.step_faults:
            faults.steps = {dice.randrange(40)}
        if dice.random() < 0.1:
            faults.most_runs = dice.randint(4, 6)  # one request has as many
        return faults

    # ------------------------------------------------------------------------------------ its life

    def run(self) -> World:
        """Tell the whole story.

        Raises:
            BrokenPromiseError: The daemon did not do what it must.
        """
        log = logging.getLogger()
        handlers, log.handlers = log.handlers, [_Defects(self.loop)]
        logging.disable(logging.WARNING)
        try:
            self._run()
        finally:
            logging.disable(logging.NOTSET)
            log.handlers = handlers
        for client in self.clients:
            self.seen.update(client.endings())
        for engine in self.source.engines:
            self.seen.update(engine.counters())
        return self

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._story())
        except RuntimeError:
            promise(not self.loop.failures, *self.loop.failures)
            raise
        finally:
            self._clear()

    def _clear(self) -> None:
        """End what a failure has left running."""
        for _ in range(5):  # some begin others in their last moments
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            with contextlib.suppress(StandstillError, RuntimeError):
                self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        asyncio.set_event_loop(None)
        self.source.close()
        self.loop.close()

    async def _story(self) -> None:
        dice = self.dice
        self.service = FrontService(
            self.source,
            self.loop,
            _LIMITS,
            version="1",
            default=FakeEntry("a"),
            keep_alive_s=dice.choice((0.2, 5.0, 300.0)),
            apps=self.apps,
            on_shutdown=lambda drain: None,
            on_defeat=self._defeat,
        )
        self.service.transport = self.transport
        self.transport.service = self.service
        habits = Habits(
            acts=dice.choice((3, 5, 6, 10)),
            pause_s=dice.choice((0.002, 0.02, 0.2)),
            impatient=dice.choice((0.0, 0.2, 0.6)),
            rude=dice.choice((0.0, 0.3)),
            names_models=dice.choice((0.0, 0.0, 0.3)),
            unloads=dice.random() < 0.2,
        )
        self.clients = [self._client() for _ in range(dice.choice((1, 2, 3, 3, 5)))]
        lives = [Script(client, dice, habits).live() for client in self.clients]
        if dice.random() < 0.2:
            for _ in range(2):
                self.loop.call_later(dice.expovariate(5.0), self._shrink)
        if dice.random() < 0.1:
            self.loop.call_later(dice.expovariate(4.0), self._shut_down)
        for _ in range(self.deaths):
            self.loop.call_later(dice.expovariate(4.0), self._strike)
        await asyncio.gather(*lives)
        if self.draining is not None:
            await self.draining
        for client in self.clients:
            client.check(self._allowed)
            client.hang_up()
        await self._quiet()
        self._check_left()
        await self.service.stop(1.0)

    def _client(self) -> Client:
        dice = self.dice
        program = Program(executable=f"/bin/{dice.choice(('one', 'two'))}")
        return Client(
            self.transport,
            dice,
            self.oracle,
            app=dice.choice(_APPS),
            priority=dice.choice(_CLASSES),
            uid=dice.choice((1000, 1000, 1001)),
            program=program,
            delay_s=dice.choice((0.0, 0.001, 0.02)),
            lost=dice.choice((0.0, 0.0, 0.0, 0.1)),
            note=self.note,
        )

    def _strike(self) -> None:
        """Something happens to the engine that there is."""
        if not self.source.engines:
            return
        engine = self.source.engines[-1]
        if engine.status is not None:
            return
        current = self.service.models.current
        if (current is None or current.down) and self.dice.random() < 0.8:
            self.loop.call_later(0.05, self._strike)  # it is the streams that shall be struck
            return
        self.struck_loading |= current is None or current.down
        hangs = self.dice.random() < 0.2
        self.note(f"engine {engine.pid} {'hangs' if hangs else 'dies'}")
        self.seen["hangs" if hangs else "deaths"] += 1
        if hangs:
            engine.hang()
        else:
            engine.die(self.dice.choice((-9, -11, 1)))

    def _shrink(self) -> None:
        """Another program takes memory of the pool, for a while."""
        engines, blocks = self.source.engines, self.source.shape.kv_blocks
        if engines:
            fewer = self.dice.randint(2, blocks)
            self.note(f"engine {engines[-1].pid} has {fewer} blocks")
            self.seen["shrunk"] += 1
            engines[-1].resize(fewer)
            self.loop.call_later(self.dice.random() * 2.0, engines[-1].resize, blocks)

    def _shut_down(self) -> None:
        """As `pagedd_daemon.front.server` does when it is asked to."""
        grace_s = self.dice.choice((0.0, 0.05, 1.0))
        self.note(f"the daemon is to end within {grace_s} s")
        self.draining = self.loop.create_task(self._drain(grace_s))

    async def _drain(self, grace_s: float) -> None:
        self.service.drain()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.service.idle(), grace_s)
        await self.service.stop(1.0)

    def note(self, what: str) -> None:
        """Write down what happens."""
        self.log.append(f"{self.loop.time():.6f} {what}")

    def _defeat(self) -> None:
        self.defeated = True

    async def _quiet(self) -> None:
        """Wait until neither front nor engine has anything to do any more. An engine that hangs
        while it loads is given up after half an hour."""
        end = self.loop.time() + LOAD_MOST_S + 10.0
        while self.loop.time() < end:
            await asyncio.sleep(1.0)
            engine = self.source.engines[-1] if self.source.engines else None
            rests = engine is None or engine.status is not None or engine.at_rest
            settled = self.service.models.state in (State.ASLEEP, State.READY)
            # What an engine has that was stopped is gone with it, and nobody keeps books of that.
            running = self.draining is None and self.service._streams.running
            if rests and settled and not running:
                return
        promise(False, "the daemon does not come to rest:", self.service.models.state)

    # ---------------------------------------------------------------------------- what must be so

    def _look(self, engine: SimEngine) -> None:
        """After a turn of an engine."""
        self.steps += 1
        if self.steps % 16 == 0:
            assert engine.engine is not None
            engine.engine.validate()
        if self.steps % 4 == 0:
            self._check_quotas(engine)

    def _check_quotas(self, engine: SimEngine) -> None:
        assert engine.engine is not None
        core = engine.engine
        ceiling = self.config.apps["agent"].kv_ceiling if "agent" in self.config.apps else 0
        held = max(self.apps._interactive.values(), default=0)
        most = self.config.unknown.interactive_samples
        promise(held <= most, "unknown apps hold", held, "interactive samples of", most)
        running: dict[str, set[int]] = {}
        for sequence in core._scheduler.sequences():
            running.setdefault(sequence.request.app, set()).add(sequence.request.rid)
        for key, app in engine.apps.items():
            most = app.max_running
            count = len(running.get(key, ()))
            promise(not most or count <= most, app.name, "runs", count, "requests of", most)
            if app.name == "agent" and ceiling:
                blocks = core._pool.pager.namespace_blocks(core._books.root(app.root))
                promise(blocks * BLOCK_TOKENS <= ceiling, app.name, "holds", blocks, "blocks")

    def _allowed(self, code: str, asked: Asked) -> bool:
        """Whether a request may have ended with this error."""
        allowed: dict[str, bool] = {
            "E_BUSY": True,
            "E_DRAINING": self.draining is not None,
            "E_SLOW": True,
            "E_NEVER_FITS": True,
            "E_TOO_LONG": True,
            "E_LIMIT": True,
            "E_SESSION": asked.fields["verb"].startswith("session."),
            "E_EXPIRED": asked.fields["verb"].startswith("session."),
            "E_COMMIT": asked.fields["verb"] == "session.commit",
            "E_FIELD": asked.prompt is None,
            "E_TOKEN_ID": asked.prompt is None,
            "E_MODEL": asked.fields.get("model") == "c" or self.bad_loads > 0,
            "E_DEADLINE": "deadline_ms" in asked.fields,
            "E_HELPER": self.source.helper.failing > 0,
            "E_POISON": self.deaths + self.bad_loads > 2,
            "E_ENGINE": self.step_faults
            or self.bad_loads > 0
            or self.struck_loading
            or (asked.fields["verb"] == "embed" and self.deaths > 1),  # it is tried twice
        }
        return allowed.get(code, False)

    def _check_left(self) -> None:
        """Nobody is connected: nothing may be left of anybody."""
        service = self.service
        streams, calls, models = service._streams, service._calls, service.models
        promise(not self.transport.connected, "connections are left")
        promise(not calls.peers and not calls._live.total, "calls are left")
        promise(not streams._waiting, "streams wait")
        promise(self.draining is not None or not streams._by_rid, "streams are left")
        promise(not service._embeddings.running, "embeddings are left")
        promise(not service._background.tasks, "tasks are left")
        promise(not calls._asked_bytes.total, "texts of calls are left")
        promise(not service._sessions_open.total and not service._pins._pinned, "sessions are left")
        promise(not self.apps._interactive, "samples are held:", self.apps._interactive)
        for line in service._gate._lines.values():
            promise(not line.waiting and not line.under_way, "somebody is at the gate")
        for account in service._accounts._accounts.values():
            promise(not account.live and not account.running, account.app, "has requests")
        promise(not service.board._asked, "somebody waits for figures")
        promise(not models._queue, "somebody waits for a model")
        if models.current is not None:
            promise(not models.current.leases, models.current.leases, "leases are out")
            engine = models.current.engine
            assert isinstance(engine, SimEngine)
            self._check_engine(engine)

    def _check_engine(self, engine: SimEngine) -> None:
        assert engine.engine is not None
        core = engine.engine
        core.validate()
        books = core._books
        promise(not books.requests and not books._live, "the engine has requests")
        promise(not books._quotas, "the engine has quotas")
        promise(not list(core._scheduler.sequences()), "the engine has sequences")
        stats = core._pool.pager.stats()
        used = stats.gpu.used, stats.ram.used, stats.disk.used
        promise(used == (0, 0, 0), "blocks have owners:", stats)


class _Defects(logging.Handler):
    """Makes a failure of every exception that the daemon has caught and logged."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def emit(self, record: logging.LogRecord) -> None:
        """Take one."""
        if record.exc_info and record.exc_info[1] is not None:
            told = {"message": record.getMessage(), "exception": record.exc_info[1]}
            self._loop.call_exception_handler(told)
