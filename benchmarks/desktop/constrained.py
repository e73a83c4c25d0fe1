"""Output that must match a schema: whether it does, whether it ends, and what that costs."""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
from typing import Any

import pagedd
from benchmarks.desktop.servers import DesktopDaemon
from benchmarks.desktop.trace import text
from benchmarks.report import Report, Row

POOL_TOKENS = 16_384
SCHEMAS = 1_000
_AT_ONCE = 16
_SPEED_STREAMS = 8
_SPEED_TOKENS = 128
_NAMES = ("name", "city", "count", "tags", "size", "open", "kind", "notes")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def constrained(report: Report, threads: int) -> None:
    """The rows of validity and speed."""
    with DesktopDaemon(POOL_TOKENS, threads, {}) as ours:
        asyncio.run(_validity(report, ours.daemon.host, 100 if report.quick else SCHEMAS))
        asyncio.run(_speed(report, ours.daemon.host, 2 if report.quick else 5))


async def _validity(report: Report, host: str, count: int) -> None:
    dice = random.Random(22)
    schemas = [schema(dice) for _ in range(count)]
    room = asyncio.Semaphore(_AT_ONCE)
    async with pagedd.aconnect("schemas", host=host, timeout=600) as client:

        async def one(number: int) -> tuple[str, bool, int]:
            async with room:
                asked = f"Describe {text(random.Random(number), 3)} as JSON:\n"
                made = await client.complete(
                    asked, max_tokens=2_000, seed=number, json_schema=schemas[number]
                )
            return made.samples[0].reason, _valid(made.text, schemas[number]), len(made.text)

        ended = await asyncio.gather(*(one(number) for number in range(count)))
    stopped = sum(reason == "stop" for reason, _, _ in ended)
    valid = sum(ok for _, ok, _ in ended)
    note = f"{stopped:,} ended by stop; {statistics.mean(n for _, _, n in ended):.0f} characters"
    what = f"constrained output, {count:,} random bounded schemas: ended by stop and valid"
    both = sum(ok and reason == "stop" for reason, ok, _ in ended)
    report.add(Row(what, 100 * both / count, "%", "== 100", f"{valid:,} valid, {note} on average"))


async def _speed(report: Report, host: str, trials: int) -> None:
    """Eight streams at a time, free and constrained in turn."""
    # Longer than any reply here, so that all streams generate from beginning to end.
    long_text = {"type": "string", "minLength": 4_000, "maxLength": 8_000}
    rates: dict[bool, list[float]] = {False: [], True: []}
    async with pagedd.aconnect("speed", host=host, timeout=600) as client:
        for trial in range(-1, trials):
            for bound in (False, True):
                rate = await _rate(client, trial, json.dumps(long_text) if bound else None)
                if trial >= 0:  # the first compiles, and is warm-up for both
                    rates[bound].append(rate)
    free, bound_rate = (statistics.median(rates[bound]) for bound in (False, True))
    slower = 100 * (1 - bound_rate / free)
    note = f"free {free:.0f} tok/s, constrained {bound_rate:.0f}; medians of {trials} in turn"
    what = f"constrained output, {_SPEED_STREAMS} streams: slower than free text by"
    report.add(Row(what, slower, "%", "<= 5", note))


async def _rate(client: pagedd.AsyncClient, trial: int, json_schema: str | None) -> float:
    """Tokens a second of all streams together, while all of them generate."""
    options: dict[str, Any] = {"json_schema": json_schema} if json_schema else {"ignore_eos": True}
    made = await asyncio.gather(
        *(
            client.complete(
                text(random.Random(100 * trial + number), 24),
                max_tokens=_SPEED_TOKENS,
                seed=number,
                **options,
            )
            for number in range(_SPEED_STREAMS)
        )
    )
    tokens = sum(one.usage.generated_tokens for one in made)
    return tokens / max(one.timings.generation_ms for one in made) * 1e3


# ------------------------------------------------------------------------------------ the schemas


def schema(dice: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of which every text is short: strings, numbers and arrays are bounded."""
    kinds = ["string", "integer", "boolean", "enum", "pattern"]
    nested = ["array", "object"] if depth < 3 else []
    kind = "object" if depth == 0 else dice.choice([*kinds, *nested])
    if kind == "string":
        return {"type": "string", "maxLength": dice.randint(0, 16)}
    if kind == "integer":
        least = dice.randint(-1_000, 1_000)
        return {"type": "integer", "minimum": least, "maximum": least + dice.randint(0, 10_000)}
    if kind == "boolean":
        return {"type": "boolean"}
    if kind == "enum":
        return {"enum": ["".join(dice.choices(_LETTERS, k=5)) for _ in range(dice.randint(1, 5))]}
    if kind == "pattern":
        last, most = dice.choice(_LETTERS), dice.randint(1, 9)
        return {"type": "string", "pattern": f"^[a-{last}]{{1,{most}}}$"}
    if kind == "array":
        return {"type": "array", "items": schema(dice, depth + 1), "maxItems": dice.randint(0, 4)}
    names = dice.sample(_NAMES, dice.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: schema(dice, depth + 1) for name in names},
        "required": names[: dice.randint(0, len(names))],
        "additionalProperties": False,
    }


def _valid(said: str, wanted: dict[str, Any]) -> bool:
    try:
        return matches(json.loads(said), wanted)
    except ValueError:
        return False


def matches(value: Any, wanted: dict[str, Any]) -> bool:
    """Whether a value is of a schema that `schema` made; written for those words alone, so that
    what is checked does not check itself."""
    if "enum" in wanted:
        return value in wanted["enum"]
    kind = wanted["type"]
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "integer":
        fits = isinstance(value, int) and not isinstance(value, bool)
        return fits and wanted["minimum"] <= value <= wanted["maximum"]
    if kind == "string":
        return isinstance(value, str) and _string(value, wanted)
    if kind == "array":
        fits = isinstance(value, list) and len(value) <= wanted["maxItems"]
        return fits and all(matches(item, wanted["items"]) for item in value)
    if not isinstance(value, dict) or not set(wanted["required"]) <= set(value):
        return False
    properties = wanted["properties"]
    return all(name in properties and matches(value[name], properties[name]) for name in value)


def _string(value: str, wanted: dict[str, Any]) -> bool:
    if "pattern" in wanted:
        return re.search(wanted["pattern"], value) is not None
    return len(value) <= int(wanted["maxLength"])
