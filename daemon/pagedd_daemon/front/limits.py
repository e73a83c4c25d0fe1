"""Every limit of the daemon in one table. docs/protocol.md section 7 is generated from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, slots=True)
class Limits:
    """What one message, one connection and the daemon may take at most."""

    frame_bytes: int = 8 * 2**20
    """Bytes of one ZeroMQ frame; a larger one closes the connection."""
    frames: int = 1
    """Frames of one message."""
    depth: int = 16
    """Nesting of maps and lists in a message."""
    map_entries: int = 4096
    """Entries of one map."""
    list_entries: int = 65536
    """Entries of one list."""
    string_bytes: int = 4 * 2**20
    """Bytes of one string (a prompt, a message)."""
    binary_bytes: int = 4 * 2**20
    """Bytes of one binary (1,048,576 token ids)."""
    total_nodes: int = 262_144
    """Values of all kinds in one message: what a small message may grow to in memory."""
    handshake_ms: int = 2000
    """Time for a connection's handshake."""
    id_chars: int = 64
    """Characters of a request id."""
    app_chars: int = 64
    """Characters of an app name."""
    samples: int = 16
    """``n`` of one request."""
    logprobs: int = 20
    """``logprobs`` of one request."""
    stop_strings: int = 16
    """Stop strings of one request."""
    stop_string_bytes: int = 256
    """Bytes of one stop string."""
    stop_token_ids: int = 64
    """Stop token ids of one request."""
    logit_bias: int = 1024
    """Entries of ``logit_bias``."""
    messages: int = 4096
    """Messages of one chat."""
    tools: int = 256
    """Tools of one chat."""
    sessions_per_connection: int = 64
    """Open sessions of one connection."""
    requests_per_connection: int = 256
    """Requests of one connection that are not over."""
    requests_total: int = 4096
    """Requests of all connections that are not over."""
    connections: int = 1024
    """Connections that have said hello."""
    output_bytes_per_connection: int = 2**20
    """Bytes waiting for a client that does not read, before its requests are paused."""
    remembered_requests: int = 64
    """Finished requests of one connection whose events can be sent again."""


DEFAULT_LIMITS = Limits()


def as_map(limits: Limits) -> dict[str, int]:
    """The limits as ``hello`` returns them."""
    return {name: int(value) for name, value in asdict(limits).items()}


def names() -> tuple[str, ...]:
    """The limits in table order."""
    return tuple(f.name for f in fields(Limits))
