"""The daemon's figures in Prometheus' text format, for the control verb ``metrics``.

prometheus_client writes the text. It takes 50 ms and 4 MB to import, so it is imported when
somebody asks for the first time, in the thread that renders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pagedd_daemon.front.measures import Histogram, Measures


@dataclass(frozen=True, slots=True)
class Figures:
    """What is shown, gathered on the event loop."""

    version: str
    status: Mapping[str, Any]
    stats: Mapping[str, Any]
    outcomes: tuple[tuple[str, str, Mapping[str, int]], ...]
    """App, program and counters of each account; of all that are forgotten, empty names."""
    measures: Mapping[str, tuple[tuple[str, list[tuple[str, float]], float], ...]]
    """Class -> name, cumulative buckets and sum of each histogram."""


OUTCOMES = ("finished", "cancelled", "failed")
TOKENS = ("prompt", "cached", "generated")


def histograms(measures: Measures) -> tuple[tuple[str, list[tuple[str, float]], float], ...]:
    """The histograms of a class as `Figures` has them."""

    def one(name: str, histogram: Histogram) -> tuple[str, list[tuple[str, float]], float]:
        return name, histogram.cumulative(), histogram.sum

    return (
        one("time_to_first_token", measures.first_token),
        one("inter_token", measures.between_tokens),
        one("queue_wait", measures.queue),
    )


_HELP = {
    "time_to_first_token": "From the arrival of a request to its first token.",
    "inter_token": "Between two tokens of a sample, as they left the engine.",
    "queue_wait": "From the arrival of a request to its first step.",
}


def text(figures: Figures, joules: Mapping[str, float]) -> str:
    """Prometheus' text format 0.0.4. Not for the event loop."""
    from prometheus_client import CollectorRegistry, generate_latest

    class Collector:
        def collect(self) -> Iterator[Any]:
            return _families(figures, joules)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return str(generate_latest(registry).decode())


def _families(figures: Figures, joules: Mapping[str, float]) -> Iterator[Any]:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        InfoMetricFamily,
    )

    status, stats = figures.status, figures.stats
    yield InfoMetricFamily("pagedd", "The daemon.", {"version": figures.version})
    yield GaugeMetricFamily("pagedd_uptime_seconds", "Since it started.", status["uptime_s"])
    yield CounterMetricFamily("pagedd_steps", "Steps of the engine.", status["steps"])

    model = GaugeMetricFamily(
        "pagedd_model_loaded", "1 for the loaded model.", labels=["model", "backend", "device"]
    )
    for loaded in status["models"]:
        names = [loaded["name"], status["backend"] or "", status["device"] or ""]
        model.add_metric(names, 1)
    yield model

    requests = GaugeMetricFamily("pagedd_requests", "Requests by what they do.", labels=["state"])
    for state, count in status["requests"].items():
        requests.add_metric([state], count)
    yield requests

    blocks = GaugeMetricFamily(
        "pagedd_blocks", "Blocks of KV by tier and state.", labels=["tier", "state"]
    )
    for tier, usage in status["kv"].items():
        for state in ("used", "cached", "free"):
            blocks.add_metric([tier, state], usage[state])
    yield blocks

    app = ["app", "program"]
    ended = CounterMetricFamily(
        "pagedd_requests_ended", "Requests that are over.", labels=[*app, "outcome"]
    )
    tokens = CounterMetricFamily("pagedd_tokens", "Tokens of requests.", labels=[*app, "kind"])
    for name, program, counters in figures.outcomes:
        for outcome in OUTCOMES:
            ended.add_metric([name, program, outcome], counters[outcome])
        for kind in TOKENS:
            tokens.add_metric([name, program, kind], counters[f"{kind}_tokens"])
    yield ended
    yield tokens

    kv = GaugeMetricFamily(
        "pagedd_app_kv_tokens", "Tokens in KV by app and tier.", labels=[*app, "tier"]
    )
    live = GaugeMetricFamily(
        "pagedd_app_requests", "Requests of an app by what they do.", labels=[*app, "state"]
    )
    for row in status["apps"]:
        who = [row["app"], row["program"] or ""]
        for tier, count in row["kv"].items():
            kv.add_metric([*who, tier], count)
        for state in ("running", "waiting"):
            live.add_metric([*who, state], row[state])
    yield kv
    yield live

    for index, name in enumerate(_HELP):
        family = HistogramMetricFamily(f"pagedd_{name}_seconds", _HELP[name], labels=["class"])
        for klass, found in figures.measures.items():
            family.add_metric([klass], found[index][1], sum_value=found[index][2])
        yield family

    for group, name in (("memory", "memory_bytes"), ("pager", "pager"), ("backend", "backend")):
        numbers = {k: v for k, v in stats.get(group, {}).items() if isinstance(v, int | float)}
        gauge = GaugeMetricFamily(
            f"pagedd_{name}",
            f"The engine's figures of its {group}, since it started.",
            labels=["what"],
        )
        for what, value in numbers.items():
            gauge.add_metric([what], value)
        yield gauge

    energy = CounterMetricFamily(
        "pagedd_energy_joules", "Energy the machine's devices have used.", labels=["device"]
    )
    for device, used in joules.items():
        energy.add_metric([device], used)
    yield energy
