"""The four apps of ``make demo``, each a small program in a process of its own.

What they do is what real ones do; what they print is read by ``demo.py``: one line of JSON for each
piece of text, ``[kind, text]`` with kind ``ask``, ``text`` or ``note``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import TypedDict

import pagedd


class Style(TypedDict):
    """Options that all of the apps use."""

    temperature: float
    seed: int


STYLE: Style = {"temperature": 0.7, "seed": 7}
"""A seed, so that one run of the demo looks like the other."""

TIMEOUT_S = 120.0
"""The longest wait for the next piece of a stream: the demo should work on a busy machine too."""


def say(kind: str, text: str) -> None:
    """One line for ``demo.py``."""
    print(json.dumps([kind, text]), flush=True)


def show(stream: pagedd.Stream) -> pagedd.Completion:
    """Print a stream as it comes."""
    for chunk in stream:
        say("text", chunk.text)
    return stream.result


def autocomplete(host: str) -> None:
    """An editor: short completions, somebody is waiting for each."""
    lines = (
        "def fibonacci(n):\n    ",
        "import json\n\ndef load(path):\n    ",
        "class Stack:\n    def __init__(self):\n        ",
        "for line in open('log.txt'):\n    ",
    )
    with pagedd.connect(app="editor", priority="interactive", host=host, timeout=TIMEOUT_S) as llm:
        for line in lines:
            say("ask", line)
            sent = time.monotonic()
            stream = llm.generate(line, max_tokens=24, stop=["\n\n"], **STYLE)
            say("text", next(stream).text)
            waited = time.monotonic() - sent
            show(stream)
            say("note", f"first token after {waited * 1000:.0f} ms")
            time.sleep(0.7)  # the person reads, and types on


def chat(host: str) -> None:
    """A chat window: two turns, then a branch that tries another question from the same history."""
    with pagedd.connect(app="chat", host=host, timeout=TIMEOUT_S) as llm:
        session = llm.session(system="You are a helpful assistant. Answer briefly.")
        for question in ("Name three rivers of Europe.", "Which of them is the longest?"):
            say("ask", question)
            show(session.say(question, max_tokens=60, **STYLE))
        branch = session.fork()
        question = "Now name three mountains."
        say("ask", f"(branch) {question}")
        result = show(branch.say(question, max_tokens=60, **STYLE))
        usage = result.usage
        say("note", f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were cached")


TOOLS = "".join(
    f"Tool {number}: {name}. {what} It takes one argument, answers with plain text, and must not "
    "be called twice with the same argument. Say why you call it before you do.\n"
    for number, (name, what) in enumerate(
        (
            ("read_file", "Reads a file of the project and gives back its lines."),
            ("write_file", "Replaces a file of the project by the text that is given."),
            ("list_folder", "Lists the names in a folder, folders first."),
            ("search", "Looks for a word in all files and gives back where it was found."),
            ("run_tests", "Runs the tests and gives back the names of those that failed."),
            ("ask_user", "Asks the person a question and waits for the answer."),
        ),
        start=1,
    )
)


def agent(host: str) -> None:
    """An agent: every step sends the same long instructions again, which are computed once."""
    with pagedd.connect(app="agent", host=host, timeout=TIMEOUT_S) as llm:
        for task in ("Fix the failing test.", "Rename the module.", "Say what you would do first."):
            say("ask", f"[{len(TOOLS)} characters of instructions] {task}")
            messages = [{"role": "system", "content": TOOLS}, {"role": "user", "content": task}]
            usage = show(llm.chat(messages, max_tokens=40, **STYLE)).usage
            say("note", f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were cached")


ARTICLES = (
    "The lighthouse on the cape was built of granite in 1853 and its lamp burned oil until 1923.",
    "A bakery in the old town sells bread from an oven that has not gone out for ninety years.",
    "The new tram line joins the harbour and the university, and it runs every seven minutes.",
    "After three dry summers the lake is so low that the walls of a drowned village show again.",
    "The library lends tools as well as books, and the drill is out more often than any novel.",
    "A storm took the roof of the school in March, and the pupils had lessons in the town hall.",
)


async def summarise(host: str) -> None:
    """A batch job: everything at once, and nobody is waiting."""

    async def one(llm: pagedd.AsyncClient, number: int, article: str) -> None:
        question = f"Summarise in five words: {article}"
        stream = llm.chat([{"role": "user", "content": question}], max_tokens=48, **STYLE)
        text = "".join([chunk.text async for chunk in stream])
        say("text", f"{number}. {text.strip()}\n")

    async with pagedd.aconnect(
        app="summariser", priority="background", host=host, timeout=TIMEOUT_S
    ) as llm:
        say("ask", f"{len(ARTICLES)} articles at once")
        await asyncio.gather(*(one(llm, n, a) for n, a in enumerate(ARTICLES, start=1)))


def main() -> int:
    """Run the app of that name; exit status 1 if it failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("app", choices=("editor", "chat", "agent", "summariser"))
    parser.add_argument("--host", required=True)
    options = parser.parse_args()
    try:
        if options.app == "summariser":
            asyncio.run(summarise(options.host))
        else:
            {"editor": autocomplete, "chat": chat, "agent": agent}[options.app](options.host)
    except pagedd.PageddError as error:
        say("note", f"failed: {error.code}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
