"""Bringing a random history to an end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvpager import Preempt, Pressure, Reserve, Resume, SetQuota
from tests.support.pager_models import ROOTS, check

if TYPE_CHECKING:
    from tests.support.pager_world import World


class Ending:
    """A simple scheduler that lets every sequence of a world run to its end."""

    def __init__(self, world: World) -> None:
        self._world = world

    def finish(self) -> None:
        """Every sequence runs to its end, and then nothing is held any more."""
        world = self._world
        world.send(Pressure(world.config.gpu_blocks))
        for root in ROOTS:
            world.ceilings[root] = 0
            world.send(SetQuota(root))
        for _ in range(40 + 60 * len(world.models)):
            if not world.models:
                break
            self._one_round()
        self._settle()
        check(not world.models, f"these never end: {list(world.models.values())}")
        world.pager.validate()
        stats = world.pager.stats()
        check(stats.gpu.used == 0, f"blocks still used: {stats.gpu}")
        used = stats.ram.used + stats.disk.used
        check(used == 0, f"slots still used: {stats.ram}, {stats.disk}")
        check(
            not world.llama or not world.device.cells,
            f"the backend still has {list(world.device.cells)}",
        )

    def _settle(self) -> None:
        world = self._world
        rounds = 0
        while world.device.steps or world.device.transfers:
            rounds += 1
            check(rounds <= 200, "copies in background beget one another for ever")
            while world.device.steps:
                world.end_step()
            for transfer in list(world.device.transfers):
                world.report(transfer, ok=True)

    def _one_round(self) -> None:
        """What a simple scheduler does."""
        world = self._world
        self._settle()
        for model in world.of("running"):
            if model.computed == len(model.tokens):
                world.end(model)
        self._settle()
        for model in [*world.of("swapped"), *world.of("asking")]:
            if model.status == "swapped":
                world.send(Resume(model.id))
            elif model.status == "asking":
                world.ask(model)
        self._settle()
        running = [model for model in world.of("running") if model.known() > 0]
        work = []
        for model in running:
            if model.status != "running":
                continue
            count = model.known()
            world.send(Reserve((model.id,), (count,)))
            if model.id in world.short and count > 1:
                count = 1
                world.send(Reserve((model.id,), (count,)))
            if model.id in world.short and len(world.models) == 1:
                model.cut(model.computed)  # longer than the pool: its caller would end it
            elif model.id in world.short:
                victim = world.pager.choose_victim([item.id for item in world.of("running")])
                if victim is not None:
                    world.step_aside(victim)
                    world.send(Preempt(victim))
            else:
                work.append((model, count))
        world.launch([(model, count) for model, count in work if model.status == "running"])
