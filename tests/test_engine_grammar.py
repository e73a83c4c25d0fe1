"""Constrained output: what is drawn matches, whatever the pool and the steps do meanwhile."""

from __future__ import annotations

import asyncio
import json
import random
import re
from array import array

import numpy as np
import pytest

from benchmarks.schemas import random_schema, valid
from pagedd_daemon import messages as m
from pagedd_daemon.engine.core import Engine
from pagedd_daemon.engine.grammar import Grammars
from pagedd_daemon.front.detokenizer import pack_ids
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.helper_pool import HelperError, HelperPool
from pagedd_daemon.front.wire import parse_data
from pagedd_daemon.helper.protocol import HelperLimits
from pagedd_daemon.helper.vocabulary import ByteVocabulary
from tests.test_engine_core import SALT, Bench, prompt_of, sampling, stopping

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z]{1,12}$"},
            "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
        },
        "required": ["name", "sizes"],
        "additionalProperties": False,
    }
)
ENDLESS = [
    {"type": "string", "pattern": f".*{letter}.{{{50 * i}}}.*"}
    for i, letter in enumerate("abcdefghijklmnopqrst")
]
"""All of them at once take 20 s to compile."""
LARK = 'start: greeting " " NAME "!"\ngreeting: "Hello" | "Goodbye"\nNAME: /[A-Z][a-z]{1,9}/'


class GrammarBench(Bench):
    """A bench whose engine knows the simulated vocabulary's bytes."""

    def __init__(self, **over: object) -> None:
        super().__init__(**over)  # type: ignore[arg-type]
        vocabulary = ByteVocabulary()
        configure = m.Configure(
            "simulated", "", bytes(32), 0, 0, 0, 1,
            piece_lengths=pack_ids(vocabulary.piece_lengths),
            pieces=vocabulary.pieces,
        )  # fmt: skip
        self.grammars = Grammars(configure, self.backend.capabilities)
        self.engine = Engine(self.backend, lambda: self.now, self.grammars)

    def ask(self, rid: int, kind: str, text: str, *, n: int = 1, seed: int = 0) -> None:
        self.engine.handle(
            m.Submit(
                rid=rid,
                app=f"app{rid % 3}",
                klass=1,
                root=SALT,
                prompt=np.asarray(prompt_of(rid, 20 + 7 * rid), dtype="<i4").tobytes(),
                n=n,
                sampling=sampling(temperature=1.0, seed=seed),
                stop=stopping(max_tokens=400, ignore_eos=False),
                grammar_kind=kind,
                grammar=text,
            )
        )

    def run(self, most_steps: int = 2_000_000) -> None:
        super().run(most_steps)
        self.grammars.close()

    def text(self, rid: int, index: int = 0) -> str:
        outcome = self.outcomes[rid]
        assert outcome.rejected is None, outcome.rejected
        assert outcome.reasons[index] == "stop"
        return bytes(outcome.tokens[index]).decode()


def matches_schema(text: str) -> bool:
    value = json.loads(text)
    assert set(value) == {"name", "sizes"}
    assert re.fullmatch("[a-z]{1,12}", value["name"])
    assert len(value["sizes"]) <= 3
    return all(isinstance(size, int) for size in value["sizes"])


@pytest.mark.parametrize("llama", [False, True])
def test_every_kind_of_grammar_is_kept_to_beside_free_requests(llama: bool) -> None:
    bench = GrammarBench(llama=llama)
    bench.submit(9, prompt_of(9, 50), max_tokens=60)
    bench.ask(1, "regex", "(yes|no), [0-9]{3}")
    bench.ask(2, "json_schema", SCHEMA)
    bench.ask(3, "grammar", LARK)
    bench.run()
    assert re.fullmatch("(yes|no), [0-9]{3}", bench.text(1))
    assert matches_schema(bench.text(2))
    assert re.fullmatch("(Hello|Goodbye) [A-Z][a-z]{1,9}!", bench.text(3))
    alone = Bench(llama=llama)
    alone.submit(9, prompt_of(9, 50), max_tokens=60)
    alone.run()
    assert bench.outcomes[9].tokens == alone.outcomes[9].tokens


@pytest.mark.parametrize("llama", [False, True])
def test_under_pressure_constrained_texts_are_those_of_a_plain_run(llama: bool) -> None:
    def texts(kv_tokens: int) -> tuple[list[str], int]:
        bench = GrammarBench(kv_tokens=kv_tokens, llama=llama)
        for rid in range(1, 9):
            bench.ask(rid, "json_schema", SCHEMA, n=1 + rid % 3, seed=rid)
        bench.run()
        found = [bench.text(rid, i) for rid in range(1, 9) for i in range(1 + rid % 3)]
        pager = bench.engine.snapshot().figures["pager"]
        return found, pager["preemptions_swap"] + pager["preemptions_recompute"]

    plain, _ = texts(8192)
    pressed, preempted = texts(480)
    assert preempted > 0
    assert pressed == plain
    assert all(map(matches_schema, plain))


def test_a_grammar_the_engine_cannot_compile_ends_that_request_alone() -> None:
    bench = GrammarBench()
    bench.ask(1, "regex", "(((")
    bench.ask(2, "regex", "[a-c]{4}")
    bench.run()
    rejected = bench.outcomes[1].rejected
    assert rejected is not None
    assert rejected.code == "E_GRAMMAR"
    assert re.fullmatch("[a-c]{4}", bench.text(2))


def test_a_request_cancelled_while_its_grammar_compiles_is_closed() -> None:
    bench = GrammarBench()
    bench.ask(1, "regex", "[a-c]{4}")
    bench.engine.handle(m.Cancel(1))
    bench.step()
    bench.grammars.close()
    assert bench.outcomes[1].reasons == {0: "cancelled"}
    assert bench.outcomes[1].closed is not None


def test_an_engine_that_cannot_constrain_says_so() -> None:
    bench = GrammarBench()
    bench.engine = Engine(bench.backend, lambda: bench.now)
    bench.ask(1, "regex", "a")
    bench.step()
    rejected = bench.outcomes[1].rejected
    assert rejected is not None
    assert (rejected.code, rejected.details) == ("E_GRAMMAR", {"backend": "simulated"})


def test_random_bounded_schemas_are_all_matched_and_ended_by_stop() -> None:
    bench = GrammarBench()
    source = random.Random(5)
    schemas = [random_schema(source) for _ in range(60)]
    for rid, schema in enumerate(schemas, 1):
        bench.ask(rid, "json_schema", json.dumps(schema), seed=rid)
    bench.run()
    for rid, schema in enumerate(schemas, 1):
        assert valid(json.loads(bench.text(rid)), schema), (schema, bench.text(rid))


def test_json_has_no_spaces_between_its_parts_unless_the_schema_wants_them() -> None:
    bench = GrammarBench()
    flexible = {**json.loads(SCHEMA), "x-guidance": {"whitespace_flexible": True}}
    for rid in range(1, 9):
        bench.ask(rid, "json_schema", SCHEMA, seed=rid)
        bench.ask(100 + rid, "json_schema", json.dumps(flexible), seed=rid)
    bench.ask(50, "json_schema", "true", seed=1)
    bench.run()
    for rid in range(1, 9):
        assert not re.search(r"\s", bench.text(rid))
    assert any(re.search(r"\s", bench.text(100 + rid)) for rid in range(1, 9))


# ------------------------------------------------------------------------------- helper and wire


def test_the_helper_refuses_what_is_invalid_or_explosive_and_goes_on() -> None:
    async def refusal(pool: HelperPool, kind: str, text: str) -> str:
        model = await pool.open("simulated")
        with pytest.raises(HelperError) as caught:
            await pool.try_grammar(model, kind, text)
        return caught.value.code

    async def run() -> None:
        pool = HelperPool(1, HelperLimits())
        await pool.start()
        try:
            model = await pool.open("simulated")
            for kind, text in (
                ("regex", "((("),
                ("json_schema", "{"),
                ("json_schema", '{"type": "nonsense"}'),
                ("grammar", "start: nothing"),
                (
                    "grammar",
                    "start: X\nX: "
                    + " & ".join(map("/(.*{}.{{300}}.*)+/".format, "abcdefghijklmnop")),
                ),
                ("json_schema", json.dumps({"allOf": ENDLESS})),
            ):
                assert await refusal(pool, kind, text) == "E_GRAMMAR", text
            await pool.try_grammar(model, "json_schema", SCHEMA)
        finally:
            await pool.close()

    asyncio.run(run())


def test_a_grammar_that_takes_too_long_is_refused_and_costs_one_process() -> None:
    async def run() -> None:
        pool = HelperPool(1, HelperLimits(grammar_s=1e-6))
        await pool.start()
        try:
            model = await pool.open("simulated")
            with pytest.raises(HelperError) as caught:
                await pool.try_grammar(model, "json_schema", SCHEMA)
            assert (caught.value.code, caught.value.details) == ("E_GRAMMAR", {"seconds": 1e-6})
            assert await pool.tokenize(model, "ab") == pack_ids(array("i", list(b"ab")))
        finally:
            await pool.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"regex": "a", "grammar": "start: A"}, "E_FIELD", "grammar"),
        ({"regex": "a", "ignore_eos": True}, "E_FIELD", "ignore_eos"),
        ({"json_schema": "{}", "min_tokens": 3}, "E_FIELD", "min_tokens"),
        ({"regex": ""}, "E_FIELD", "regex"),
        ({"json_schema": {"type": "object"}}, "E_FIELD", "json_schema"),
        ({"grammar": "x" * 65537}, "E_LIMIT", "grammar"),
    ],
)
def test_contradicting_or_oversize_grammars_are_refused(
    fields: dict[str, object], code: str, field: str
) -> None:
    message = {"v": 1, "verb": "generate", "id": "g", "prompt": "x", **fields}
    with pytest.raises(WireError) as caught:
        parse_data(message)
    assert (caught.value.code, caught.value.details["field"]) == (code, field)


def test_a_constrained_sample_resumed_anywhere_ends_as_it_would_have_ended() -> None:
    plain = GrammarBench()
    plain.ask(1, "json_schema", SCHEMA, seed=4)
    plain.run()
    wanted = plain.outcomes[1].tokens[0]
    bench = GrammarBench()
    for at in range(1, len(wanted) + 1):
        prompt = np.asarray([*prompt_of(1, 27), *wanted[:at]], dtype="<i4")
        bench.engine.handle(
            m.Submit(
                rid=at,
                app="app",
                klass=1,
                root=SALT,
                prompt=prompt.tobytes(),
                n=1,
                sampling=sampling(temperature=1.0, seed=4),
                stop=stopping(max_tokens=400, ignore_eos=False),
                grammar_kind="json_schema",
                grammar=SCHEMA,
                generated=at,
            )
        )
    bench.run()
    for at in range(1, len(wanted) + 1):
        outcome = bench.outcomes[at]
        assert outcome.tokens[0] == wanted[at:], at
        assert outcome.reasons == {0: "stop"}
