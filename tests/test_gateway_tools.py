"""Calls of functions: what templates show, what grammars allow, what is read of a text."""

from __future__ import annotations

import json
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedd_daemon.grammars import compile_grammar, make_tokenizer
from pagedd_daemon.helper.templates import ChatTemplate
from pagedd_http.tools import (
    FALLBACK,
    PROBE_TOOLS,
    Call,
    Form,
    Function,
    Reader,
    grammar,
    probes,
    read_form,
    spelled_out,
)

HERMES = """
{%- if tools %}<|im_start|>system
# Tools
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "assistant" and message.tool_calls %}
{{- '<|im_start|>assistant' }}
{%- for call in message.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' }}{{ call.function.name }}{{ '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
LISTED = """
{%- for message in messages %}
{%- if message.tool_calls %}[CALLS] [
{%- for call in message.tool_calls %}{{ {"name": call.function.name,
 "arguments": call.function.arguments} | tojson }}{{ ", " if not loop.last }}
{%- endfor %}]</s>
{%- else %}{{ "[" + message.role + "]" + message.content }}
{{- "</s>" if message.role == "assistant" }}{% endif %}{% endfor %}
"""
SILENT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

WEATHER = Function(
    "weather",
    "Says it.",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
NOW = Function("now")
CALLED = Call("weather", {"city": "Łódź"})

_TOKENIZER = make_tokenizer(array("i", [1] * 256 + [0, 0]), bytes(range(256)), 258, [256])


def form_of(template: str) -> Form:
    compiled = ChatTemplate(template, "", "")
    asked, answered, called = (
        compiled.render({"messages": one, "tools": PROBE_TOOLS, "add_generation_prompt": True})
        for one in probes()
    )
    return read_form(asked, answered, called)


def allowed(text: str, rules: str) -> bool:
    """Whether a text is a whole sentence of a grammar."""
    matcher = compile_grammar(_TOKENIZER, "grammar", rules)
    data = list(text.encode())
    return bool(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())


def written(form: Form, *calls: Call) -> str:
    texts = [
        f"{form.before}{form.head}{json.dumps(call.name)}{form.middle}"
        f"{json.dumps(call.arguments, ensure_ascii=False)}{form.tail}{form.after}"
        for call in calls
    ]
    return form.between.join(texts)


@pytest.fixture(params=[HERMES, SILENT], ids=["of the template", "fallback"])
def form(request: pytest.FixtureRequest) -> Form:
    return form_of(request.param)


def test_a_template_shows_how_its_model_writes_calls() -> None:
    form = form_of(HERMES)
    assert form.own
    assert form.mark == "<tool_call>"
    assert (form.head, form.middle, form.tail) == ('{"name": ', ', "arguments": ', "}")
    compiled = ChatTemplate(HERMES, "", "")
    calls = [{"function": {"name": c.name, "arguments": c.arguments}} for c in (CALLED, CALLED)]
    messages = [{"role": "assistant", "tool_calls": calls}]
    assert written(form, CALLED, CALLED).strip() in compiled.render({"messages": messages})


@pytest.mark.parametrize("template", [SILENT, LISTED, "{{ messages[0].content }}", "x"])
def test_a_template_that_shows_no_calls_gets_the_notation_of_many_models(template: str) -> None:
    assert form_of(template) == FALLBACK


def test_a_text_or_calls_are_allowed_and_nothing_between(form: Form) -> None:
    rules = grammar(form, [WEATHER, NOW], required=False, parallel=True)
    assert allowed("It is <b>fine</b>.", rules)
    assert allowed(written(form, CALLED), rules)
    assert allowed("Let me see." + written(form, CALLED, Call("now", {})), rules)
    assert not allowed(written(form, Call("rain", {})), rules)
    assert not allowed(written(form, Call("weather", {"city": 5})), rules)
    assert not allowed(written(form, CALLED)[:-3], rules)
    assert not allowed("Let me see. " + form.mark, rules)


def test_a_required_call_is_nothing_else(form: Form) -> None:
    rules = grammar(form, [WEATHER], required=True, parallel=False)
    assert allowed(written(form, CALLED), rules)
    assert not allowed("It is fine.", rules)
    assert not allowed(written(form, CALLED, CALLED), rules)


def test_an_answer_that_is_no_call_matches_its_schema(form: Form) -> None:
    answer = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    rules = grammar(form, [WEATHER], required=False, parallel=True, answer=answer)
    assert allowed('{"a":5}', rules)
    assert allowed(written(form, CALLED), rules)
    assert not allowed("It is fine.", rules)


@given(data=st.data())
def test_calls_are_read_however_a_text_is_cut(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([form_of(HERMES), FALLBACK]))
    said = data.draw(st.sampled_from(["", "Let me see.", "a < b <tool", "{}"]))
    calls = data.draw(st.lists(st.sampled_from([CALLED, Call("now", {})]), max_size=3))
    text = said + (form.between if said and calls else "") + (written(form, *calls))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    reader, texts, found = Reader(form), "", []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        more, new = reader.feed(text[start:end])
        texts += more
        found += new
    texts += reader.finish()
    assert found == calls
    assert texts.strip() == said


def test_a_call_that_was_cut_off_is_text() -> None:
    reader = Reader(FALLBACK)
    text = written(FALLBACK, CALLED)[:-20]
    said, calls = reader.feed(text)
    assert (said, calls, reader.finish()) == ("", [], text)


def test_without_tools_of_the_template_the_conversation_says_it_all() -> None:
    calls = [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}]
    told = spelled_out(
        [
            {"role": "system", "content": "Be terse."},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "sunny", "tool_call_id": "x"},
        ],
        [WEATHER],
    )
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be terse.\n\n")
    assert '"name": "weather"' in told[0]["content"]
    assert Reader(FALLBACK).feed(told[2]["content"])[1] == [Call("weather", {"city": "Rome"})]
    assert "sunny" in told[3]["content"]
