"""An editor's autocomplete: one short completion for the text before the cursor.

Lines on standard input are what the editor sees, one state of the text before the cursor after the
other, separated by a form feed. A newer state cancels the completion of the older one.

    printf 'def fibonacci(n):\\n    ' | python examples/autocomplete.py
"""

from __future__ import annotations

import asyncio
import sys

import pagedd

LINES_BEFORE = 60
"""What the model sees of the file. The beginning stays the same from key to key, so its KV is found
again and only the end is computed."""


async def complete(llm: pagedd.AsyncClient, before: str) -> str:
    """The rest of the line or block, as far as the model is sure enough to stop."""
    prompt = "".join(before.splitlines(keepends=True)[-LINES_BEFORE:])
    # A completion that comes too late is of no use: the daemon gives it up by itself.
    async with llm.generate(
        prompt, max_tokens=32, temperature=0.2, stop=["\n\n"], deadline_ms=20_000
    ) as stream:
        return await stream.text()


async def main() -> None:
    """Complete every state; show what the newest one got."""
    states = [state for state in sys.stdin.read().split("\f") if state]
    async with pagedd.aconnect(app="my-editor", priority="interactive") as llm:
        running: asyncio.Task[str] | None = None
        for before in states:
            if running is not None:
                # Cancelling the task leaves its `async with`, which cancels the request.
                running.cancel()
            running = asyncio.create_task(complete(llm, before))
            await asyncio.sleep(0.05)  # the time between two keys
        if running is not None:
            print(await running)


if __name__ == "__main__":
    asyncio.run(main())
