"""What each request was answered with, kept so that a resend finds it again.

Protocol section 6: a client that misses a sequence number sends its request again and gets every
event above the last one it has. Live requests keep all their events, finished ones are kept as long
as the connection remembers them and the budget of the daemon lasts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack

from pagedd_daemon.front.ports import Event
from pagedd_daemon.front.tally import Tally
from pagedd_daemon.link import values

_BATCH = 128
"""Events packed together. A chunk is about 600 bytes as a dict and 30 packed: without this, sixteen
streams of 8,192 tokens would take the whole memory the front may have."""


class Journal:
    """The events of one request, in order; event ``i`` has ``seq`` ``i``."""

    __slots__ = ("_id", "_packed", "_tail", "forgotten", "size_bytes")

    def __init__(self, request_id: str) -> None:
        self._id = request_id
        self.forgotten = False
        """The events were dropped to stay within the budget."""
        self._packed: list[bytes] = []
        self._tail: list[Event] = []
        self.size_bytes = 0
        """Bytes of the packed part."""

    def append(self, event: Event) -> None:
        """Keep the next event."""
        self._tail.append(event)
        if len(self._tail) == _BATCH:
            self.pack()

    def pack(self) -> None:
        """Pack what is not packed yet. Only the last batch may be shorter than the others, so
        this is for the last event of the request."""
        if self._tail:
            batch: bytes = msgpack.packb([_compact(event) for event in self._tail])
            self._packed.append(batch)
            self.size_bytes += len(batch)
            self._tail = []

    def forget(self) -> None:
        """Drop every event."""
        self._packed, self._tail, self.size_bytes, self.forgotten = [], [], 0, True

    def since(self, after: int) -> Iterator[Event]:
        """Every event with ``seq`` above ``after``."""
        first, skip = divmod(after + 1, _BATCH)
        seq = first * _BATCH
        for batch in self._packed[first:]:
            for packed in values(batch):
                if skip:
                    skip -= 1
                else:
                    yield self._expand(seq, packed)
                seq += 1
        if first <= len(self._packed):
            yield from self._tail[skip:]

    def _expand(self, seq: int, packed: Any) -> Event:
        event: dict[str, Any] = {"id": self._id, "seq": seq}
        if isinstance(packed, list):
            event |= {"type": "chunk", "index": packed[0], "text": packed[1], "tokens": packed[2]}
            if len(packed) > 3:
                event["logprobs"] = packed[3]
        else:
            event |= packed
        return event


class Remembered:
    """The journals of finished requests of all connections, within a budget of bytes for each user
    and one for all."""

    def __init__(self, budget_bytes: int, per_user_bytes: int) -> None:
        self._budget = budget_bytes
        self._per_user = per_user_bytes
        self._owners: dict[Journal, int] = {}
        self._journals: dict[int, dict[Journal, None]] = {}
        """Of each user, oldest first."""
        self._bytes = Tally()

    @property
    def size_bytes(self) -> int:
        """Of all users."""
        return self._bytes.total

    def add(self, journal: Journal, uid: int) -> None:
        """Keep a finished journal of a user; where a budget is passed, the oldest of who has most
        are forgotten."""
        journal.pack()
        self._owners[journal] = uid
        self._journals.setdefault(uid, {})[journal] = None
        self._bytes.add(uid, journal.size_bytes)
        while self._bytes.of(uid) > self._per_user or self._bytes.total > self._budget:
            self.forget(next(iter(self._journals[self._bytes.most()])))

    def forget(self, journal: Journal) -> None:
        """Drop a journal's events, whether they were kept until now or not."""
        uid = self._owners.pop(journal, None)
        if uid is not None:
            del self._journals[uid][journal]
            if not self._journals[uid]:
                del self._journals[uid]
            self._bytes.add(uid, -journal.size_bytes)
        journal.forget()


def _compact(event: Event) -> Any:
    if event["type"] != "chunk":
        return {key: value for key, value in event.items() if key not in ("id", "seq")}
    chunk = [event["index"], event["text"], event["tokens"]]
    if "logprobs" in event:
        chunk.append(event["logprobs"])
    return chunk
