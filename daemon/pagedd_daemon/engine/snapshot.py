"""The engine's figures as one map, for `status` and `stats`.

Keys::

    kv         {gpu, ram, disk}: each {blocks_total, used, cached, free}
    split      {token_state, reserved, internal, external}, tokens of the first tier
    sequences  {running, swapped, ids_total}
    requests   {running, waiting, paused}
    steps      steps since start
    progress   rises unless something is under way that does not end
    median_step_s  of the last steps, in seconds
    tokens     {prompt, cached, generated} of requests since start; computed prompt tokens are
               prompt - cached
    apps       key -> {running, waiting, kv_gpu_tokens, kv_ram_tokens, kv_disk_tokens,
               prompt_tokens, cached_tokens, generated_tokens,
               share: of all that was charged in the last ten seconds, 0 to 1}
    pager      {stored_pages, loaded_pages, copied_blocks, preemptions_swap, preemptions_recompute,
               NAME_tokens_per_s: the rates that are known (`kvpager.Pager.rates`)}
    memory     {weights, kv_pool, ram_tier}, bytes
    troubles   sentences for people: what does not work as it was configured
    backend    what the backend counts (`Backend.counters`)
    owned      [owner, cached pages on disk] of each who has any (`pagedd_daemon.owners`)
    blocks     only if it was asked for: {gpu, ram, disk}, each {every, cells} (`kvpager.TierMap`)
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from kvpager import Pager
from kvpager.types import TierUsage
from pagedd_daemon.backends.base import Backend
from pagedd_daemon.engine.scheduler import Scheduler
from pagedd_daemon.engine.work import Request, SequenceState

_APP_KEYS = ("prompt", "cached", "generated")
MAP_CELLS = 16_384
"""Cells of a tier in the block map: of a larger one only every second block is shown, or every
third. More would be less than a pixel each, and the whole map fits a message of 48 KiB so."""


class Totals:
    """Token counts per app since the engine started."""

    def __init__(self) -> None:
        self.apps: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_APP_KEYS, 0))

    def start(self, request: Request) -> None:
        """A request's prompt begins to be computed."""
        counts = self.apps[request.app]
        counts["prompt"] += len(request.prompt)
        counts["cached"] += request.cached_tokens

    def end(self, request: Request) -> None:
        """A request has generated all it will."""
        self.apps[request.app]["generated"] += request.generated_tokens


def snapshot(
    pager: Pager,
    scheduler: Scheduler,
    backend: Backend,
    totals: Totals,
    steps: int,
    now: float,
) -> dict[str, Any]:
    """The map that the module's docstring describes."""
    stats = pager.stats()
    requests = {id(s.request): s.request for s in scheduler.sequences()}
    memory = backend.memory()
    return {
        "kv": {
            "gpu": _tier(stats.gpu),
            "ram": _tier(stats.ram),
            "disk": _tier(stats.disk),
        },
        "split": asdict(stats.split),
        "sequences": {
            "running": stats.sequences_running,
            "swapped": stats.sequences_swapped,
            "ids_total": stats.sequence_ids_total,
        },
        "requests": {
            "running": sum(not r.paused for r in requests.values()),
            "waiting": scheduler.waiting,
            "paused": sum(r.paused for r in requests.values()),
        },
        "steps": steps,
        "tokens": {key: sum(counts[key] for counts in totals.apps.values()) for key in _APP_KEYS},
        "apps": _apps(scheduler, totals, now),
        "pager": {
            "stored_pages": stats.stored_pages,
            "loaded_pages": stats.loaded_pages,
            "copied_blocks": stats.copied_blocks,
            "preemptions_swap": stats.preemptions_swap,
            "preemptions_recompute": stats.preemptions_recompute,
            **{f"{name}_tokens_per_s": round(rate) for name, rate in pager.rates().items()},
        },
        "memory": asdict(memory),
        "backend": backend.counters(),
        "owned": [list(item) for item in pager.owned().items()],
        "troubles": [*backend.troubles(), *_small_pool(backend, scheduler)],
    }


def block_map(pager: Pager) -> dict[str, dict[str, Any]]:
    """What each block is doing, by tier."""
    return {
        tier.name.lower(): asdict(of_tier) for tier, of_tier in pager.block_map(MAP_CELLS).items()
    }


def _small_pool(backend: Backend, scheduler: Scheduler) -> list[str]:
    caps = backend.capabilities
    if scheduler.blocks >= caps.gpu_blocks:
        return []
    now, most = (blocks * caps.block_tokens for blocks in (scheduler.blocks, caps.gpu_blocks))
    return [f"The pool has {now:,} of {most:,} tokens: other programs use the GPU's memory."]


def _tier(usage: TierUsage) -> dict[str, int]:
    return {
        "blocks_total": usage.total,
        "used": usage.used,
        "cached": usage.cached,
        "free": usage.free,
    }


def _apps(scheduler: Scheduler, totals: Totals, now: float) -> dict[str, dict[str, Any]]:
    apps: dict[str, dict[str, Any]] = {}

    def entry(name: str) -> dict[str, Any]:
        if name not in apps:
            counts = totals.apps[name]
            apps[name] = {
                "running": 0,
                "waiting": 0,
                "kv_gpu_tokens": 0,
                "kv_ram_tokens": 0,
                "kv_disk_tokens": 0,
                **{f"{key}_tokens": counts[key] for key in _APP_KEYS},
                "share": round(scheduler.turns.share(name, now), 4),
            }
        return apps[name]

    for name in list(totals.apps):
        entry(name)
    for request in scheduler.queued():
        entry(request.app)["waiting"] += 1
    counted: set[int] = set()
    for sequence in scheduler.sequences():
        app = entry(sequence.request.app)
        if sequence.request.rid not in counted:
            counted.add(sequence.request.rid)
            app["running"] += 1
        swapped = sequence.state is SequenceState.PREEMPTED
        app["kv_ram_tokens" if swapped else "kv_gpu_tokens"] += sequence.computed
    return apps
