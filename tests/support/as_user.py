"""A process that becomes another user and does what it is told, a line of JSON for each thing.

    python -m tests.support.as_user UID GID GROUP…

It imports everything first: the checkout may be closed to that user.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pagedd

ROOT = Path(__file__).parents[2]


class User:
    """The other end: a user of the machine, who is not ours."""

    def __init__(self, uid: int, host: str, groups: Sequence[int] = ()) -> None:
        """A process of ``uid``, whose own group has the same number, that finds the daemon at
        ``host``."""
        self.uid = uid
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.as_user", *map(str, (uid, uid, *groups))],
            cwd=ROOT,
            env={**os.environ, "PAGEDD_HOST": host},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def does(self, what: str, **arguments: Any) -> Any:
        """Have it done; what came of it, or the code of the error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> User:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


class _Doer:
    """What can be asked; each method's result goes back as JSON."""

    def __init__(self) -> None:
        self._clients: list[pagedd.Client] = []
        self._streams: list[pagedd.Stream] = []

    def connect(self, app: str, times: int = 1) -> int:
        """So many connections more; how many there are."""
        for _ in range(times):
            self._clients.append(pagedd.connect(app, timeout=60.0))
        return len(self._clients)

    def generate(self, prompt: str, **options: Any) -> dict[str, Any]:
        """On the first connection, to its end."""
        done = self._clients[0].generate(prompt, **options).wait()
        usage = done.usage
        return {"text": done.text, "prompt": usage.prompt_tokens, "cached": usage.cached_tokens}

    def begin(self, prompt: str, **options: Any) -> str:
        """A stream that goes on; its first text."""
        self._streams.append(self._clients[0].generate(prompt, **options))
        return next(self._streams[-1]).text

    def end(self) -> str:
        """Wait for the end of the oldest of these; its reason."""
        return self._streams.pop(0).wait().samples[0].reason

    def call(self, verb: str, **options: Any) -> Any:
        """A method of the first client."""
        result = getattr(self._clients[0], verb)(**options)
        return result if isinstance(result, (dict, str)) else None

    def control(self, verb: str, **options: Any) -> Any:
        """A method of the control socket."""
        with pagedd.control(timeout=60.0) as control:
            return getattr(control, verb)(**options)


def main() -> int:
    """Serve until standard input ends."""
    uid, gid, *groups = map(int, sys.argv[1:])
    os.setgroups(groups)
    os.setgid(gid)
    os.setuid(uid)
    doer = _Doer()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(doer, asked.pop("do"))(**asked)
        except pagedd.PageddError as error:
            answer = {"error": type(error).__name__, "code": error.code, **error.details}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
