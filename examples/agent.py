"""An agent with tools: each step is JSON of a schema, so it can always be read.

python examples/agent.py "What is 6 times 7?"
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import date

import pagedd

STEPS = 4


def multiply(argument: str) -> str:
    """Two whole numbers, as in ``6 7``."""
    numbers = [int(word) for word in argument.split() if word.lstrip("-").isdigit()]
    return str(numbers[0] * numbers[1]) if len(numbers) >= 2 else "give two whole numbers"


def today(_: str) -> str:
    """Takes nothing."""
    return date.today().isoformat()


TOOLS: dict[str, Callable[[str], str]] = {"multiply": multiply, "today": today}

STEP = {
    "type": "object",
    "properties": {
        "action": {"enum": [*TOOLS, "answer"]},
        "argument": {"type": "string", "maxLength": 60},
    },
    "required": ["action", "argument"],
    "additionalProperties": False,
}

SYSTEM = (
    "You solve a task step by step. Reply with JSON: an action and its argument.\n"
    + "\n".join(f"{name}: {(tool.__doc__ or '').strip()}" for name, tool in TOOLS.items())
)


def main() -> None:
    """Ask, do what it says, tell it what came of that, until it answers."""
    task = sys.argv[1] if len(sys.argv) > 1 else "What is 6 times 7?"
    with pagedd.connect(app="agent", priority="background") as llm:
        session = llm.session(system=SYSTEM)
        message = task
        for _ in range(STEPS):
            reply = session.say(message, json_schema=STEP, max_tokens=200, temperature=0).wait()
            if reply.samples[0].reason == "length":
                print("it went on and on")
                return
            step = json.loads(reply.text)
            print(f"{step['action']}: {step['argument']}")
            if step["action"] == "answer":
                return
            message = TOOLS[step["action"]](step["argument"])
            print(f"  -> {message}")
        print("no answer within its steps")


if __name__ == "__main__":
    main()
