"""Every limit of the daemon in one table.

``python -m pagedd_daemon.front.limits`` prints it as section 7 of docs/protocol.md has it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


def _limit(default: int, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, slots=True)
class Limits:
    """What one message, one connection and the daemon may take at most."""

    frame_bytes: int = _limit(
        8 * 2**20, "Bytes of one ZeroMQ frame; a larger one closes the connection."
    )
    frames: int = _limit(1, "Frames of one message.")
    depth: int = _limit(16, "Nesting of maps and lists in a message, the message itself included.")
    map_entries: int = _limit(4096, "Entries of one map.")
    list_entries: int = _limit(16384, "Entries of one list.")
    string_bytes: int = _limit(4 * 2**20, "Bytes of one string (a prompt, the text of a message).")
    binary_bytes: int = _limit(4 * 2**20, "Bytes of one binary (1,048,576 token ids).")
    total_nodes: int = _limit(
        65536,
        "Values of all kinds in one message, map keys included: what a small message may grow to "
        "in memory.",
    )
    handshake_ms: int = _limit(2000, "Time for a connection's handshake.")
    heartbeat_ms: int = _limit(30_000, "Time between two heartbeats (ZMTP PING) to a client.")
    silence_ms: int = _limit(
        300_000,
        "Time without a sign of life after a heartbeat until a client counts as gone; a client "
        "that is stopped, or leaves a full queue unread, gives none.",
    )
    messages_per_s: int = _limit(
        2000,
        "Messages a second of one process on each socket, over all its connections; one counts "
        "again for each whole 4 KiB. Further ones are refused (`E_BUSY`).",
    )
    message_burst: int = _limit(4000, "Messages of one process at once, after a silence.")
    messages_per_s_per_user: int = _limit(
        20_000,
        "The same of all processes of one user, and twice as many at once, after a silence.",
    )
    id_chars: int = _limit(64, "Characters of a request id.")
    app_chars: int = _limit(64, "Characters of an app name.")
    samples: int = _limit(16, "`n` of one request.")
    best_of: int = _limit(16, "`best_of` of one request.")
    beam_width: int = _limit(16, "`beam_width` of one request.")
    logprobs: int = _limit(20, "`logprobs` or `prompt_logprobs` of one request.")
    stop_strings: int = _limit(16, "Stop strings of one request.")
    stop_string_bytes: int = _limit(256, "Bytes of one stop string.")
    stop_token_ids: int = _limit(64, "Stop token ids of one request.")
    grammar_bytes: int = _limit(
        65536, "Bytes of `json_schema`, `regex` or `grammar` of one request."
    )
    logit_bias: int = _limit(1024, "Entries of `logit_bias`.")
    messages: int = _limit(4096, "Messages of one chat.")
    tools: int = _limit(256, "Tools of one chat.")
    embed_inputs: int = _limit(128, "Texts of one `embed`.")
    sessions_per_connection: int = _limit(64, "Open sessions of one connection.")
    sessions_per_user: int = _limit(4096, "Open sessions of one user.")
    sessions_total: int = _limit(4096, "Open sessions of all connections.")
    requests_per_connection: int = _limit(256, "Requests of one connection that are not over.")
    requests_per_user: int = _limit(4096, "Requests of one user that are not over.")
    requests_total: int = _limit(4096, "Requests of all connections that are not over.")
    request_bytes_per_user: int = _limit(
        256 * 2**20, "Bytes of prompts, token ids and messages of one user's such requests."
    )
    request_bytes_total: int = _limit(
        256 * 2**20, "Bytes of prompts, token ids and messages of all requests that are not over."
    )
    connections_per_user: int = _limit(
        1024,
        "Connections of one user that have said hello; where others share the daemon, also "
        "connections of one user on each socket, hello or not.",
    )
    connections: int = _limit(1024, "Connections that have said hello.")
    output_bytes_per_connection: int = _limit(
        2**20,
        "Bytes waiting for a client that does not read, before its requests are paused and new "
        "ones refused (`E_SLOW`).",
    )
    output_bytes_per_user: int = _limit(
        64 * 2**20,
        "Bytes waiting for all clients of one user; beyond it, which of them has most waiting is "
        "disconnected.",
    )
    output_bytes_total: int = _limit(
        64 * 2**20,
        "Bytes waiting for all clients; beyond it, who has most of them waiting is disconnected.",
    )
    remembered_requests: int = _limit(
        64, "Finished requests of one connection whose events can be sent again."
    )
    remembered_bytes_per_user: int = _limit(
        16 * 2**20, "Bytes of events of one user's finished requests."
    )
    remembered_bytes: int = _limit(
        16 * 2**20, "Bytes of events of finished requests, of all connections together."
    )


DEFAULT_LIMITS = Limits()

USERS = 4
"""Where several users share a daemon, each may take this part of what all may: no user at a limit
keeps another from being served, and a few who are, a fifth."""

_TOTALS = {
    "sessions_per_user": "sessions_total",
    "requests_per_user": "requests_total",
    "request_bytes_per_user": "request_bytes_total",
    "connections_per_user": "connections",
    "output_bytes_per_user": "output_bytes_total",
    "remembered_bytes_per_user": "remembered_bytes",
}
"""What one user may take, and what all may."""


def for_several_users(limits: Limits = DEFAULT_LIMITS) -> Limits:
    """The limits of a daemon that several users share."""
    parts = {name: getattr(limits, total) // USERS for name, total in _TOTALS.items()}
    per_s = limits.messages_per_s_per_user // USERS
    return replace(limits, **parts, messages_per_s_per_user=per_s)


def as_map(limits: Limits) -> dict[str, int]:
    """The limits as ``hello`` returns them."""
    return {name: int(value) for name, value in asdict(limits).items()}


def names() -> tuple[str, ...]:
    """The limits in table order."""
    return tuple(f.name for f in fields(Limits))


def markdown(limits: Limits = DEFAULT_LIMITS) -> str:
    """The limits as a Markdown table."""
    shared = for_several_users(limits)

    def value(name: str) -> str:
        alone, part = getattr(limits, name), getattr(shared, name)
        return f"{alone:,}" if part == alone else f"{alone:,}; shared: {part:,}"

    rows = (f"| `{f.name}` | {value(f.name)} | {f.metadata['meaning']} |" for f in fields(limits))
    return "\n".join(("| limit | value | meaning |", "|---|---|---|", *rows))


if __name__ == "__main__":
    print(markdown())
