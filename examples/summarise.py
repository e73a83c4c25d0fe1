"""Summarises files in the background, several at once, with a progress bar.

They share their instructions, whose KV is computed once. As a background app it makes way for
whatever a person is waiting for, and nothing of it is lost when that happens.

    python examples/summarise.py docs/*.md
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from rich.progress import Progress

import pagedd

AT_ONCE = 8
CHARACTERS = 3_000
INSTRUCTIONS = "You summarise texts. Reply with one plain sentence and nothing else."


async def summarise(llm: pagedd.AsyncClient, text: str, turn: asyncio.Semaphore) -> str:
    """One sentence about a text."""
    messages = [
        {"role": "system", "content": INSTRUCTIONS},
        {"role": "user", "content": text[:CHARACTERS] or "(an empty file)"},
    ]
    async with turn, llm.chat(messages, max_tokens=48, temperature=0.3, timeout=600) as stream:
        return " ".join((await stream.text()).split())


async def main() -> None:
    """All files of the command line; each summary is printed when it is there."""
    paths = [Path(name) for name in sys.argv[1:]] or [Path(__file__)]
    turn = asyncio.Semaphore(AT_ONCE)
    async with pagedd.aconnect(app="summariser", priority="background", timeout=600) as llm:
        with Progress() as progress:
            bar = progress.add_task("summarising", total=len(paths))

            async def one(path: Path) -> None:
                try:
                    text = await asyncio.to_thread(path.read_text, "utf-8", "replace")
                    said = await summarise(llm, text, turn)
                except (OSError, pagedd.RequestError) as error:
                    said = f"failed: {error}"
                progress.console.print(f"{path}: {said}", markup=False, highlight=False)
                progress.advance(bar)

            await asyncio.gather(*map(one, paths))


if __name__ == "__main__":
    asyncio.run(main())
