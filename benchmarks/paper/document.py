"""Writes `docs/paper.md` and its figures from the committed results.

python -m benchmarks.paper.document
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.__main__ import DATA
from benchmarks.paper.curves import LEVELS_S, rate_at
from benchmarks.paper.model import LatencyModel
from benchmarks.paper.policies import POLICIES, TITLES
from benchmarks.paper.sections import NAMES, PAPER_RATE, arithmetic_saving
from benchmarks.paper.svg import Axis, lines, stacked
from benchmarks.paper.workload import SHAPES, lengths
from benchmarks.report import RESULTS, ROOT, shown

TEMPLATE = Path(__file__).with_name("paper.md.in")
"""The words, for `str.format`."""
DOCUMENT = ROOT / "docs" / "paper.md"
FIGURES = ROOT / "docs" / "paper"

# The paper's own figures (arXiv 2309.06180).
SPLIT = {
    "max": (20.4, 13.3, 57.3, 8.9),
    "pow2": (26.8, 17.9, 13.6, 41.6),
    "oracle": (38.2, 25.2, 0.0, 36.6),
    "paged": (96.3, None, None, None),
}
"""Figure 2, percent: token state, reserved, internal, external and others."""
IN_FLIGHT = {
    "sharegpt": {"max": 7.00, "pow2": 9.81, "oracle": 13.62, "paged": 30.42},
    "alpaca": {"max": 7.00, "pow2": 43.24, "oracle": 72.75, "paged": 132.44},
}
"""Figure 13."""
SAVED = {
    "parallel": {"sharegpt": "16.2–30.5", "alpaca": "6.1–9.8"},
    "beam": {"sharegpt": "44.3–66.3", "alpaca": "37.6–55.2"},
}
"""Section 6.3, percent, from the narrowest to the widest."""

ORCA = ("max", "pow2", "oracle", "paged")
PARTS = ("token state", "reserved", "internal", "external and free")
KEYS = ("token_state", "reserved", "internal", "external")
Section = Mapping[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def percent(value: float) -> str:
    """A share as percent, one decimal."""
    return f"{100 * value:.1f}"


# ------------------------------------------------------------------------------------------ tables


def verdict(report: Section) -> str:
    """Every row that must reach something."""
    return table(
        ("what", "value", "must reach", "reached"),
        [
            (
                row["what"],
                f"{shown(row['value'])} {row['unit']}",
                f"{row['must'].replace('>=', '≥').replace('<=', '≤')}",
                "yes" if row["ok"] else "**no**",
            )
            for row in report["rows"]
            if row["must"]
        ],
    )


def split_table(memory: Section, shape: str) -> str:
    """The four-way split, the paper's figure in brackets where it has one."""
    rows = []
    for policy in ORCA:
        cells = [TITLES[policy]]
        for key, paper in zip(KEYS, SPLIT[policy], strict=True):
            ours = percent(memory[shape][policy][key])
            known = shape == "sharegpt" and paper is not None
            cells.append(f"{ours} ({paper})" if known else ours)
        rows.append(cells)
    return table(("policy", *(f"{part}, %" for part in PARTS)), rows)


def flight_table(memory: Section, latency: Section) -> str:
    """Requests in flight: queue never empty, and at the paper's rates."""
    rows = []
    for shape in SHAPES:
        for policy in ORCA:
            full = memory[shape][policy]["in_flight"]
            ratio = memory[shape]["paged"]["in_flight"] / full
            at_rate = _at(latency[shape][policy], PAPER_RATE[shape])["in_flight"]
            paper = IN_FLIGHT[shape]
            rows.append(
                (
                    f"{NAMES[shape]}, {TITLES[policy]}",
                    f"{full:.2f}",
                    f"{ratio:.2f}",
                    f"{paper['paged'] / paper[policy]:.2f}",
                    f"{at_rate:.2f}",
                    f"{paper[policy]:.2f}",
                )
            )
    head = ("", "queue never empty", "paged is", "paper", "at the paper's rate", "paper")
    return table(head, rows)


def _at(curve: Sequence[Section], rate: float) -> Section:
    return next(point for point in curve if point["rate"] == rate)


def rate_table(curves: Section, policies: Sequence[str]) -> str:
    """Sustained rates at each level, and how many times as much paging sustains."""
    head = [""]
    for level in LEVELS_S:
        head += [f"requests/s at {level} s/token", "paged is"]
    rows = []
    for policy in policies:
        cells = [TITLES[policy]]
        for level in LEVELS_S:
            rate, ours = rate_at(curves[policy], level), rate_at(curves["paged"], level)
            cells += [_known(f"{rate:.2f}"), _known(f"{ours / rate:.2f}×")]
        rows.append(cells)
    return table(head, rows)


def _known(figure: str) -> str:
    return "–" if figure.startswith("nan") else figure


def sensitivity_table(sensitivity: Section) -> str:
    """Ratios at saturation for each changed coefficient."""
    return table(
        ("latency model", "against Orca (Oracle)", "against Orca (Max)"),
        [
            (f"`{case}`" if " x " in case else case, f"{r['oracle']:.2f}×", f"{r['max']:.2f}×")
            for case, r in sensitivity.items()
        ],
    )


def sharing_table(sharing: Section) -> str:
    """Savings of parallel sampling and beam search."""
    rows = []
    for kind, words in (("parallel", "parallel sampling"), ("beam", "beam search")):
        for shape in SHAPES:
            saved = [percent(sharing[kind][shape][width]) for width in ("2", "4", "6")]
            rows.append((f"{words}, {NAMES[shape]}", *saved, SAVED[kind][shape]))
    return table(("blocks saved, %", "2", "4", "6", "paper, 2–6"), rows)


def quiet_table(sharing: Section) -> str:
    """What the shape allows, what is saved without preemption, and what under full pressure."""
    widths = ("2", "4", "6")
    pairs = lengths("sharegpt", 1000)
    quiet, full = sharing["quiet"], sharing["parallel"]["sharegpt"]
    rows = [
        ("arithmetic, all requests", *(percent(arithmetic_saving(pairs, int(n))) for n in widths)),
        ("queue never empty, with preemption", *(percent(full[n]) for n in widths)),
        ("arithmetic, the requests of the next row", *(percent(quiet[n]["most"]) for n in widths)),
        (
            "so few requests that hardly any is preempted",
            *(percent(quiet[n]["saved"]) for n in widths),
        ),
    ]
    return table(("blocks saved, ShareGPT shape, %", *widths), rows)


def prefix_table(prefix: Section) -> str:
    """Throughput with a shared prefix."""
    rows = []
    for tokens, paper in (("80", 1.67), ("341", 3.58)):
        ours, theirs = prefix[tokens]["paged"], prefix[tokens]["oracle"]
        rows.append(
            (
                f"{tokens} tokens",
                f"{ours['rate']:.1f}",
                f"{theirs['rate']:.1f}",
                f"{ours['rate'] / theirs['rate']:.2f}×",
                f"{paper}×",
                f"{ours['in_flight']:.0f} / {theirs['in_flight']:.0f}",
            )
        )
    head = ("prefix", "paged, requests/s", "Orca (Oracle)", "ratio", "paper", "in flight")
    return table(head, rows)


def block_table(blocks: Section) -> str:
    """Latency, memory and requests in flight by block size."""
    rows = []
    for size in blocks["sharegpt"]:
        cells = [size]
        for shape in SHAPES:
            point = blocks[shape][size]
            cells += [
                f"{1e3 * point['normalized_s']:.0f}",
                f"{point['in_flight']:.1f}",
                percent(point["internal"]),
            ]
        rows.append(cells)
    head = ["block, tokens"]
    for shape in SHAPES:
        name = NAMES[shape].split()[0]
        head += [f"{name}: ms/token", "in flight", "internal waste, %"]
    return table(head, rows)


def swap_table(swap: Section) -> str:
    """Runs that swap and runs that recompute, by block size."""
    sizes = sorted({int(name.split("|")[1]) for name in swap["runs"]})
    rows = []
    for size in sizes:
        cells = [str(size)]
        for kind in ("swap", "recompute"):
            run = swap["runs"][f"{kind}|{size}"]
            cells += [
                f"{1e3 * run['normalized_s']:.0f}",
                str(run["swapped"] + run["recomputed"]),
                f"{run['computed_again']:,}",
            ]
        rows.append(cells)
    head = ["block, tokens"]
    for words in ("with RAM", "without"):
        head += [f"{words}: ms/token", "preemptions", "tokens computed again"]
    return table(head, rows)


def own_table(own: Section) -> str:
    """Microseconds of a decode step by batch."""
    return table(
        ("sequences in the step", *own["decode_us"]),
        [("µs in the pager", *(f"{us:.0f}" for us in own["decode_us"].values()))],
    )


def model_table() -> str:
    """The latency model beside what the paper saw."""
    model = LatencyModel()
    rows = []
    for shape, (prompt, output) in (("sharegpt", (161.31, 337.99)), ("alpaca", (19.31, 58.45))):
        flying, rate = IN_FLIGHT[shape]["paged"], PAPER_RATE[shape]
        step = model.step(0, 0) + model.sequence_s * flying
        step /= 1 - rate * prompt * model.prefill_s
        rows.append((NAMES[shape], f"{rate:g}", f"{flying}", f"{rate * output * step:.1f}"))
    head = ("", "requests/s", "in flight, paper", "in flight, model (Little's law)")
    return table(head, rows)


# ----------------------------------------------------------------------------------------- figures


def figures(sections: Section) -> dict[str, str]:
    """File name and SVG of every figure."""
    drawn = {
        "memory.svg": stacked(
            "What the KV memory holds, ShareGPT shape, queue never empty",
            Axis("% of the pool", 0, 100),
            {
                TITLES[policy].removesuffix(" (this pager)"): {
                    part: 100 * sections["memory"]["sharegpt"][policy][key]
                    for part, key in zip(PARTS, KEYS, strict=True)
                }
                for policy in ORCA
            },
        )
    }
    named = {**NAMES, "chat": "chatbot"}
    curves = {**sections["latency"], "chat": sections["chatbot"]}
    for shape, by_policy in curves.items():
        shown_curves = {
            TITLES[p]: [(q["rate"], q["normalized_s"]) for q in by_policy[p]]
            for p in POLICIES
            if p in by_policy
        }
        widest = max(rate_at(curve, 1.0) for curve in by_policy.values())
        drawn[f"latency-{shape}.svg"] = lines(
            f"Normalized latency against request rate, {named[shape]}",
            Axis("requests/s", 0, 1.1 * _first_number(widest, by_policy)),
            Axis("s per output token", 0, 1.0),
            shown_curves,
        )
    micro = sections["swap"]["micro"]
    names = next(iter(micro.values()))
    drawn["swap.svg"] = lines(
        f"Getting {sections['swap']['tokens']} tokens back",
        Axis("block, tokens", 1, 256, log2=True),
        Axis("ms", 0, 300),
        {name: [(int(size), 1e3 * times[name]) for size, times in micro.items()] for name in names},
    )
    return drawn


def _first_number(widest: float, curves: Mapping[str, Sequence[Section]]) -> float:
    """The rate at which the last curve leaves the plot, or the last rate tried."""
    return widest if widest == widest else max(c[-1]["rate"] for c in curves.values())


# ---------------------------------------------------------------------------------------- document


def render(results: Path = RESULTS) -> dict[Path, str]:
    """Every file of the document with its content, from the results in a folder."""
    data = json.loads((results / DATA.name).read_text(encoding="utf-8"))
    report = json.loads((results / data["report"]).read_text(encoding="utf-8"))
    sections = data["sections"]
    sharegpt = sections["latency"]["sharegpt"]
    once = sections["sharing"]["once"]["sharegpt"]
    text = TEMPLATE.read_text(encoding="utf-8").format(
        command=report["command"],
        machine=report["machine"],
        date=report["date"],
        commit=report["commit"],
        report=data["report"],
        model=model_table(),
        verdict=verdict(report),
        split=split_table(sections["memory"], "sharegpt"),
        split_alpaca=split_table(sections["memory"], "alpaca"),
        flight=flight_table(sections["memory"], sections["latency"]),
        rates=rate_table(sharegpt, ("paged", "oracle", "pow2", "max", "static")),
        rates_alpaca=rate_table(
            sections["latency"]["alpaca"], ("paged", "oracle", "pow2", "max", "static")
        ),
        sensitivity=sensitivity_table(sections["sensitivity"]),
        sharing=sharing_table(sections["sharing"]),
        once=", ".join(f"{percent(once[n])} % (n = {n})" for n in ("2", "4", "6")),
        quiet=quiet_table(sections["sharing"]),
        prefix=prefix_table(sections["prefix"]),
        chat=rate_table(sections["chatbot"], ("paged", "oracle", "pow2", "max")),
        blocks=block_table(sections["block_size"]),
        swap=swap_table(sections["swap"]),
        swap_rate=sections["swap"]["rate"],
        own=own_table(sections["own"]),
    )
    drawn = {FIGURES / name: svg for name, svg in figures(sections).items()}
    return {DOCUMENT: text, **drawn}


def main() -> None:
    """Write the files."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for path, text in render().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
