"""Tools: how a model writes its calls, a grammar that allows nothing else, and reading them.

Every family of models writes calls in its own way, and its chat template shows how: it is given a
conversation with a call in it, and what it made of the call is taken apart. Templates that show no
calls, or in a way that is not name and arguments as one JSON object, get the notation of many
models (Hermes, Qwen), which the system message then explains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_PROBE = "pagedd_probe"
_ARGUMENTS = {"pagedd_key": 7919}
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Function:
    """One that the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema of the arguments, an object; empty: any object."""

    def described(self) -> dict[str, Any]:
        """As chat templates know it."""
        parameters = dict(self.parameters) or {"type": "object", "properties": {}}
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": parameters,
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a function."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Form:
    """How calls are written: ``before {"name": "f", "arguments": {…}} after``."""

    before: str = f"{_OPEN}\n"
    head: str = '{"name": '
    """Up to the quoted name."""
    middle: str = ', "arguments": '
    tail: str = "}"
    after: str = f"\n{_CLOSE}"
    between: str = "\n"
    """Between one call's ``after`` and the next one's ``before``."""
    own: bool = False
    """It is the template's, which also lists the tools; else the system message must."""

    @property
    def mark(self) -> str:
        """What a text begins a call with, and holds nowhere else."""
        return self.before.strip() or self.head


FALLBACK = Form()


# ------------------------------------------------------------------------------- asking a template


def probes() -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Conversations to render with `PROBE_TOOLS`: one that waits for a reply, one with a text in
    its place, and one with two calls."""
    user = {"role": "user", "content": "hello"}
    call = {"type": "function", "function": {"name": _PROBE, "arguments": _ARGUMENTS}}
    calls = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    return [user], [user, {"role": "assistant", "content": _PROBE}], [user, calls]


PROBE_TOOLS = [Function(_PROBE).described()]


def read_form(asked: str, answered: str, called: str) -> Form:
    """The form that renders of the `probes` show; `FALLBACK` where they show none."""
    if not (called.startswith(asked) and answered.startswith(asked + _PROBE) and _PROBE in asked):
        return FALLBACK
    end = answered[len(asked) + len(_PROBE) :]
    body = called[len(asked) :]
    body = body.removesuffix(end) if end else body
    parts = _split(body)
    if parts is None:
        return FALLBACK
    before, one, gap, two, after = parts
    shape = _shape(one)
    if shape is None or one != two or before not in ("", gap[len(gap) - len(before) :]):
        return FALLBACK
    between = gap.removesuffix(before)
    if not between.startswith(after):
        return FALLBACK
    head, middle, tail = shape
    return Form(before, head, middle, tail, after, between[len(after) :], own=True)


def _split(body: str) -> tuple[str, str, str, str, str] | None:
    """Before, first call, between, second call, after."""
    cuts: list[tuple[int, int]] = []
    at = 0
    for _ in range(2):
        start = body.find("{", at)
        try:
            document, end = json.JSONDecoder().raw_decode(body, start) if start >= 0 else (None, 0)
        except ValueError:
            return None
        if not isinstance(document, dict) or set(map(type, document.values())) != {str, dict}:
            return None
        if list(document.values()) != [_PROBE, _ARGUMENTS]:
            return None
        cuts.append((start, end))
        at = end
    (a, b), (c, d) = cuts
    return body[:a], body[a:b], body[b:c], body[c:d], body[d:]


def _shape(call: str) -> tuple[str, str, str] | None:
    name = json.dumps(_PROBE)
    for separators in ((", ", ": "), (",", ":")):
        arguments = json.dumps(_ARGUMENTS, separators=separators)
        head, found, rest = call.partition(name)
        middle, also, tail = rest.partition(arguments)
        if found and also:
            return head, middle, tail
    return None


# -------------------------------------------------------------------------------------- constraints


def grammar(
    form: Form,
    functions: Sequence[Function],
    *,
    required: bool,
    parallel: bool,
    answer: Mapping[str, Any] | None = None,
) -> str:
    """A grammar (llguidance's Lark) of the texts that may be said.

    Args:
        form: How calls are written.
        functions: Those that may be called.
        required: A call there must be; else there may be a text instead, or before it.
        parallel: There may be several.
        answer: JSON schema of a text that is no call.
    """
    mark, begin = form.mark, _text(form.before + form.head)
    more = f" ({_text(form.between + form.before + form.head)} call)*" if parallel else ""
    if required:
        lines = [f"start: {begin} call{more}"]
    elif answer is not None:
        # No text before a call: the lexer could not tell it from the parts of the answer.
        told = json.dumps({"x-guidance": {"whitespace_flexible": False}, **answer})
        lines = [f"start: answer | {begin} call{more}", f"answer: %json {told}"]
    else:
        opened = (form.before + form.head).split(mark, 1)[1]
        rest = f" {_text(opened)}" if opened else ""
        lines = [
            f"start: TEXT | opening{rest} call{more}",
            f"opening[lazy]: /(?s:.*){_pattern(mark)}/",
            f"TEXT: /(?s:.*)/ & ~/(?s:.*){_pattern(mark)}(?s:.*)/",
        ]
    lines.append("call: " + " | ".join(f"call_{at}" for at in range(len(functions))))
    spaced = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    for at, function in enumerate(functions):
        schema = {"type": "object", **function.parameters}
        schema["x-guidance"] = {**spaced, "lenient": True}
        named = json.dumps(function.name) + form.middle
        lines.append(f"call_{at}: {_text(named)} arguments_{at} {_text(form.tail + form.after)}")
        lines.append(f"arguments_{at}: %json {json.dumps(schema)}")
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _pattern(text: str) -> str:
    """A regular expression of llguidance's Lark that matches this text alone."""
    escaped = "".join(f"\\{c}" if c in "\\.+*?()|[]{}^$/" else c for c in text)
    return escaped.replace("\n", "\\n")


# ------------------------------------------------------------------------------------------ reading


class Reader:
    """Takes calls out of a text that comes in pieces."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._held = ""
        """Text that is not out yet: of a call, or what may become one's mark."""
        self._called = False

    def feed(self, text: str) -> tuple[str, list[Call]]:
        """Takes in a piece; the text that is no part of a call, and the calls that are whole."""
        self._held += text
        said, calls = "", []
        while True:
            start = self._held.find(self._form.mark)
            if start < 0:
                keep = self._beginning()
                said += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                break
            said += self._held[:start]
            self._held = self._held[start:]
            call, end = self._call()
            if call is None:
                break
            calls.append(call)
            self._called = True
            self._held = self._held[end:].lstrip()
        if self._called and not said.strip():
            said = ""  # what stands between calls
        return said, calls

    def finish(self) -> str:
        """What was held back and became no call."""
        held, self._held = self._held, ""
        return "" if self._called and not held.strip() else held

    def _beginning(self) -> int:
        """Characters at the end that may be the beginning of a mark, with spaces before it."""
        mark, held = self._form.mark, self._held
        longest = min(len(mark) - 1, len(held))
        keep = next((n for n in range(longest, 0, -1) if held.endswith(mark[:n])), 0)
        rest = held[: len(held) - keep]
        return keep + len(rest) - len(rest.rstrip())

    def _call(self) -> tuple[Call | None, int]:
        """The call at the beginning of what is held, and where it ends."""
        after = self._form.after.strip()
        if (after or "}") not in self._held:
            return None, 0
        try:
            document, end = json.JSONDecoder().raw_decode(self._held, self._held.index("{"))
        except ValueError:
            return None, 0
        if not isinstance(document, dict) or len(document) < 2:
            return None, 0
        name, arguments = list(document.values())[:2]
        if not isinstance(arguments, dict) or not self._held[end:].lstrip().startswith(after):
            return None, 0
        end = self._held.index(after, end) + len(after)
        return Call(str(name), arguments), end


# ----------------------------------------------------------------- templates that know no tools


def spelled_out(
    messages: Sequence[Mapping[str, Any]], functions: Sequence[Function]
) -> list[dict[str, Any]]:
    """A conversation for a template that knows no tools: all of it as text."""
    listed = "\n".join(json.dumps(f.described()["function"]) for f in functions)
    told = (
        "Functions you can call, one JSON description a line:\n"
        f"{listed}\n"
        "A call is written as a JSON object between two tags:\n"
        f'{_OPEN}\n{{"name": "a name", "arguments": {{"key": "value"}}}}\n{_CLOSE}'
    )
    plain = [_spelled(message) for message in messages]
    if plain and plain[0]["role"] == "system":
        plain[0]["content"] = f"{plain[0]['content']}\n\n{told}"
        return plain
    return [{"role": "system", "content": told}, *plain]


def _spelled(message: Mapping[str, Any]) -> dict[str, Any]:
    role, content = str(message["role"]), str(message.get("content") or "")
    if role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        said = {"name": function["name"], "arguments": function.get("arguments", {})}
        calls.append(f"{_OPEN}\n{json.dumps(said)}\n{_CLOSE}")
    return {"role": role, "content": "\n".join([*([content] if content else []), *calls])}
