"""A conversation that branches: every further question is asked of the same history.

A fork shares the history and its KV, so a branch costs what it adds and nothing else.

    python examples/chat_forks.py "Name a river." "A shorter one." "One in Africa."
"""

from __future__ import annotations

import sys

import pagedd

MAX_TOKENS = 60


def show(title: str, stream: pagedd.Stream) -> None:
    """Print a reply as it comes, and what of its prompt was found and not computed."""
    print(f"{title}\n  ", end="")
    for chunk in stream:
        print(chunk.text.replace("\n", "\n  "), end="", flush=True)
    usage = stream.result.usage
    print(
        f"\n  ({usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were there already)\n"
    )


def main() -> None:
    """The first argument opens the conversation; each further one is a branch of it."""
    first, *questions = sys.argv[1:] or ["Name a river.", "A shorter one.", "One in Africa."]
    with pagedd.connect(app="chat", priority="interactive") as llm:
        trunk = llm.session(system="You are terse.")
        show(f"> {first}", trunk.say(first, max_tokens=MAX_TOKENS))
        branches = [trunk.fork() for _ in questions]
        # All branches run at once, in one batch.
        streams = [
            branch.say(question, max_tokens=MAX_TOKENS)
            for branch, question in zip(branches, questions, strict=True)
        ]
        for question, stream in zip(questions, streams, strict=True):
            show(f"> (branch) {question}", stream)


if __name__ == "__main__":
    main()
