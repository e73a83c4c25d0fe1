"""The sections of the benchmark, in order: what is run, what it must reach, what is kept of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.paper import own_time
from benchmarks.paper.beams import beam_saving
from benchmarks.paper.curves import LEVELS_S, rate_at, sweep
from benchmarks.paper.model import BLOCK_TOKENS, LAYERS, LatencyModel
from benchmarks.paper.points import Point, Workers
from benchmarks.paper.policies import POLICIES, TITLES
from benchmarks.paper.simulate import Outcome
from benchmarks.paper.workload import SHAPES, Lengths, lengths
from benchmarks.report import Report, Row

Data = dict[str, Any]
"""What a section keeps for the document; JSON."""

SATURATED = {"sharegpt": 4000, "alpaca": 10_000}
"""Requests of a run whose queue is never empty."""
TRACE_S = {"sharegpt": 1200.0, "alpaca": 300.0}
"""Length of a trace with Poisson arrivals."""
PAPER_RATE = {"sharegpt": 2.0, "alpaca": 30.0}
"""Arrivals per second at which the paper counts requests in flight (figure 13)."""
NAMES = {"sharegpt": "ShareGPT shape", "alpaca": "Alpaca shape"}


@dataclass(slots=True)
class Context:
    """What every section works with."""

    report: Report
    workers: Workers
    quick: bool
    data: Data = field(default_factory=dict)

    def scaled(self, count: float, least: int = 60) -> int:
        """``count``, or a small share of it for a quick run."""
        return max(least, int(count / 25)) if self.quick else int(count)

    def run(self, points: Mapping[str, Point]) -> dict[str, Outcome]:
        """The outcomes of named points."""
        return dict(zip(points, self.workers.run(list(points.values())), strict=True))


def saturated(context: Context, shape: str) -> dict[str, Point]:
    """A run of each policy whose queue is never empty."""
    count = context.scaled(SATURATED[shape], least=1600)
    return {policy: Point(policy, shape, count) for policy in POLICIES}


def memory(context: Context) -> Data:
    """Effective memory, the four-way split, and requests in flight."""
    data: Data = {}
    for shape in SHAPES:
        outcomes = context.run(saturated(context, shape))
        data[shape] = {policy: asdict(outcome) for policy, outcome in outcomes.items()}
    share = data["sharegpt"]
    ours = share["paged"]
    context.report.add(
        Row(
            "effective memory, ShareGPT shape, queue never empty, growth margin 1 %",
            100 * ours["token_state"],
            "%",
            ">= 96",
            f"reserved {100 * ours['reserved']:.2f}, internal {100 * ours['internal']:.2f}, "
            f"free and others {100 * ours['external']:.2f}",
        )
    )
    for policy, must in (("max", ">= 4.3"), ("pow2", ">= 3.1"), ("oracle", ">= 2.2")):
        theirs = share[policy]["in_flight"]
        context.report.add(
            Row(
                f"requests in flight against {TITLES[policy]}, queue never empty",
                ours["in_flight"] / theirs,
                "x",
                must,
                f"{ours['in_flight']:.2f} / {theirs:.2f}",
            )
        )
    return data


def latency(context: Context) -> Data:
    """Normalized latency against request rate, and the rate each policy sustains."""
    data: Data = {}
    for shape in SHAPES:
        seconds = TRACE_S[shape] / (8 if context.quick else 1)
        curves = {}
        outcomes = context.run(saturated(context, shape))
        for policy, outcome in outcomes.items():
            at = () if policy == "static" else (PAPER_RATE[shape],)
            curves[policy] = (outcome.throughput, at)
        data[shape] = sweep(context.workers, shape, curves, seconds, quick=context.quick)
    for policy, must in (("oracle", ">= 1.7"), ("max", ">= 2.7"), ("static", "")):
        what = f"request rate at equal normalized latency, ShareGPT shape, against {TITLES[policy]}"
        context.report.add(_rate_row(what, data["sharegpt"], policy, must))
    return data


def _rate_row(what: str, curves: Data, policy: str, must: str = "", note: str = "") -> Row:
    """Paged against ``policy`` at the level where that is least."""
    ratios = {
        level: rate_at(curves["paged"], level) / rate_at(curves[policy], level)
        for level in LEVELS_S
    }
    known = [ratio for ratio in ratios.values() if not math.isnan(ratio)]
    told = ", ".join(f"{r:.2f} at {level} s/token" for level, r in ratios.items())
    least = min(known, default=math.nan)
    return Row(what, least, "x", must, f"the least of {told}{note}")


def sensitivity(context: Context) -> Data:
    """The two ratios of rates again, with each coefficient 30 % off: at saturation."""
    count = context.scaled(1200, least=300)
    cases = {"as stated": ("", 1.0)}
    for name in ("step_s", "sequence_s", "prefill_s", "pcie_bytes_per_s"):
        cases |= {f"{name} x {factor}": (name, factor) for factor in (0.7, 1.3)}
    points = {
        f"{case}|{policy}": Point(policy, "sharegpt", count, changed=changed, factor=factor)
        for case, (changed, factor) in cases.items()
        for policy in ("paged", "oracle", "max")
    }
    outcomes = context.run(points)
    data: Data = {}
    for case in cases:
        rate = {p: outcomes[f"{case}|{p}"].throughput for p in ("paged", "oracle", "max")}
        data[case] = {"oracle": rate["paged"] / rate["oracle"], "max": rate["paged"] / rate["max"]}
    for policy in ("oracle", "max"):
        least = min(data, key=lambda case: float(data[case][policy]))
        context.report.add(
            Row(
                f"the same with one coefficient 30 % off, at saturation: {TITLES[policy]}",
                data[least][policy],
                "x",
                note=f"the least, {least}; as stated {data['as stated'][policy]:.2f}",
            )
        )
    return data


def sharing(context: Context) -> Data:
    """Blocks saved by parallel sampling and by beam search."""
    points = {
        f"{shape}|{n}": Point("paged", shape, context.scaled(count, least=count // 10), samples=n)
        for shape, count in (("sharegpt", 1000), ("alpaca", 6000))
        for n in (2, 4, 6)
    }
    outcomes = context.run(points)
    data: Data = {"parallel": {}, "beam": {}, "once": {}, "quiet": quiet_sharing(context)}
    for name, outcome in outcomes.items():
        shape, n = name.split("|")
        data["parallel"].setdefault(shape, {})[n] = outcome.sharing_saved
    for shape in SHAPES:
        pairs = lengths(shape, context.scaled(400, least=20))
        data["once"][shape] = {str(n): _saved_once(pairs, n) for n in (2, 4, 6)}
        data["beam"][shape] = {str(k): beam_saving(shape, k, pairs) for k in (2, 4, 6)}
    bounds = {
        "parallel": ("parallel sampling", "n", {"2": ">= 16", "6": ">= 30"}),
        "beam": ("beam search", "k", {"2": ">= 44", "6": ">= 66"}),
    }
    for kind, (words, letter, musts) in bounds.items():
        for shape in SHAPES:
            for width, saved in data[kind][shape].items():
                must = musts.get(width, "") if shape == "sharegpt" else ""
                context.report.add(
                    Row(
                        f"block saving of {words}, {letter} = {width}, {NAMES[shape]}",
                        100 * saved,
                        "%",
                        must,
                    )
                )
    return data


def quiet_sharing(context: Context) -> Data:
    """Blocks saved by parallel sampling where so few requests come that nobody is preempted, and
    what the same requests would save if every full block of each prompt was always shared."""
    count = context.scaled(400, least=60)
    points = {
        str(n): Point("paged", "sharegpt", count, rate=rate, samples=n)
        for n, rate in ((2, 0.6), (4, 0.3), (6, 0.2))
    }
    outcomes = context.run(points)
    pairs = lengths("sharegpt", count)
    return {
        n: {"saved": outcome.sharing_saved, "most": arithmetic_saving(pairs, int(n))}
        for n, outcome in outcomes.items()
    }


def arithmetic_saving(pairs: Lengths, samples: int) -> float:
    """What sharing every full block of every prompt would save over time, by arithmetic."""
    saved = blocks = 0
    for prompt, output in pairs:
        saved += (samples - 1) * (prompt // BLOCK_TOKENS) * output
        blocks += samples * sum(-(-(prompt + n) // BLOCK_TOKENS) for n in range(output))
    return saved / blocks


def _saved_once(pairs: Lengths, samples: int) -> float:
    """What sharing prompts saves if each request counts once however long it runs: arithmetic."""
    shares = []
    for prompt, output in pairs:
        blocks = sum(-(-(prompt + done) // BLOCK_TOKENS) for done in range(output))
        shares.append((samples - 1) * (prompt // BLOCK_TOKENS) * output / (samples * blocks))
    return statistics.fmean(shares)


def prefix(context: Context) -> Data:
    """A prefix that all requests share: throughput against Orca (Oracle)."""
    count = context.scaled(6000, least=1500)
    data: Data = {}
    for tokens, paper in ((80, 1.67), (341, 3.58)):
        shape = f"prefix-{tokens}"
        outcomes = context.run({p: Point(p, shape, count) for p in ("paged", "oracle")})
        rates = {p: o.throughput for p, o in outcomes.items()}
        data[str(tokens)] = {p: asdict(o) | {"rate": rates[p]} for p, o in outcomes.items()}
        context.report.add(
            Row(
                f"throughput with a shared prefix of {tokens} tokens against Orca (Oracle)",
                rates["paged"] / rates["oracle"],
                "x",
                note=f"{rates['paged']:.1f} / {rates['oracle']:.1f} requests/s; paper {paper}",
            )
        )
    return data


def chatbot(context: Context) -> Data:
    """Long histories as prompts: the rate sustained against the three Orca variants."""
    policies = ("paged", "oracle", "pow2", "max")
    count = context.scaled(1500, least=300)
    outcomes = context.run({p: Point(p, "chat", count) for p in policies})
    curves = {p: (outcome.throughput, ()) for p, outcome in outcomes.items()}
    seconds = 1200.0 / (4 if context.quick else 1)
    data = sweep(context.workers, "chat", curves, seconds, quick=context.quick)
    what = "chatbot: request rate at equal normalized latency against Orca (Oracle)"
    context.report.add(_rate_row(what, data, "oracle", note="; paper 2"))
    return data


def block_size(context: Context) -> Data:
    """Blocks of 1 to 256 tokens at one request rate near the knee."""
    sizes = (1, 16, 256) if context.quick else tuple(2**i for i in range(9))
    points = {}
    for shape, rate in (("sharegpt", 2.2), ("alpaca", 26.0)):
        seconds = TRACE_S[shape] / (8 if context.quick else 2)
        for size in sizes:
            count = int(rate * seconds)
            points[f"{shape}|{size}"] = Point("paged", shape, count, rate=rate, block_tokens=size)
    data: Data = {}
    for name, outcome in context.run(points).items():
        shape, size = name.split("|")
        data.setdefault(shape, {})[size] = asdict(outcome)
    return data


def swap(context: Context) -> Data:
    """Swapping against recomputing: the model's times, and a run with each."""
    model = LatencyModel()
    tokens = 256
    micro = {
        str(size): {
            "recompute": model.step_s + model.prefill_s * tokens,
            "swap, a copy per block": 2 * model.transfer(tokens, -(-tokens // size)),
            "swap, a copy per layer, K and V": 2
            * model.transfer(tokens, -(-tokens // size) * LAYERS * 2),
        }
        for size in (2**i for i in range(9))
    }
    rate = 2.7
    count = int(rate * TRACE_S["sharegpt"] / (8 if context.quick else 2))
    points = {
        f"{'swap' if swapping else 'recompute'}|{size}": Point(
            "paged", "sharegpt", count, rate=rate, block_tokens=size, swap=swapping
        )
        for swapping in (True, False)
        for size in ((BLOCK_TOKENS,) if context.quick else (1, 4, 16, 64, 256))
    }
    runs = {name: asdict(outcome) for name, outcome in context.run(points).items()}
    return {"micro": micro, "runs": runs, "rate": rate, "tokens": tokens}


def own(context: Context) -> Data:
    """The pager's own time and memory."""
    batches = (64, 128, 256, 512, 1024)
    grown = own_time.growth(batches, 20 if context.quick else 100)
    micros = {batch: 1e6 * seconds for batch, seconds in grown.medians.items()}
    note = "median of the quietest of 5 rounds; " + ", ".join(
        f"{batch}: {us:.0f} µs" for batch, us in micros.items()
    )
    add = context.report.add
    add(Row("the pager's own time, decode step of 256", micros[256], "µs", "<= 300", note))
    add(
        Row(
            "its growth from 64 to 1,024 sequences",
            grown.exponent,
            "exponent",
            "<= 1",
            "slope of log time over log batch; 1 is linear",
        )
    )
    admissions = [1e3 * s for s in own_time.long_admission(50_000, 5 if context.quick else 25)]
    middle = statistics.median(admissions)
    spread = f"median of {len(admissions)}, {min(admissions):.2f} to {max(admissions):.2f}"
    add(Row("admission of 50,000 tokens, all pages found", middle, "ms", "<= 10", spread))
    kept = own_time.bookkeeping(10_000 if context.quick else 100_000)
    add(
        Row(
            "bookkeeping, every block a cached page",
            kept.bytes_per_block,
            "bytes/block",
            "<= 120",
            "tracemalloc, prefix index included",
        )
    )
    add(Row("Python objects", kept.objects_per_block, "per block", "<= 0.1"))
    return {"decode_us": {str(b): us for b, us in micros.items()}, "admission_ms": middle}


SECTIONS: dict[str, Callable[[Context], Data]] = {
    "own": own,
    "memory": memory,
    "latency": latency,
    "sensitivity": sensitivity,
    "sharing": sharing,
    "prefix": prefix,
    "chatbot": chatbot,
    "block_size": block_size,
    "swap": swap,
}
