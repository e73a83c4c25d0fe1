"""Short form of ``make chaos ONLY=flood``. More of it, in process: `test_transport_sockets`."""

from __future__ import annotations

from benchmarks.chaos.flood import flood


def test_a_flood_of_connections_costs_no_stream_and_keeps_no_newcomer_out() -> None:
    outcome = flood(120, descriptors=160)
    assert outcome.made == 120
    assert outcome.alive
    assert outcome.failed == 0
    assert outcome.most_open <= 160
    assert outcome.asked >= 3
