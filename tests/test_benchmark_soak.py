"""What `make soak` does to a daemon leaves no trace in it, and a trace would be told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from benchmarks.chaos.served import serve
from benchmarks.report import Report
from benchmarks.service import Daemon
from benchmarks.soak import __main__ as soak
from benchmarks.soak.faults import Faults

IDLE = soak.Sample(0.0, 50 * 10**6, 30, 6, 4, 200 * 10**6, 8, 4, 0, 0)


def told(samples: list[soak.Sample]) -> set[str]:
    """The rows that do not reach what they must."""
    report = Report("soak", quick=True)
    soak._flat(report, samples)
    return {row.what.partition(",")[0] for row in report.rows if not row.ok}


def test_what_grows_is_told_and_what_does_not_is_well() -> None:
    flat = [replace(IDLE, at=float(at), front_files=30 + at % 2) for at in range(10)]
    assert told(flat) == set()
    leaking = [replace(s, front_files=30 + at, front_bytes=(50 + 9 * at) * 10**6)
               for at, s in enumerate(flat)]  # fmt: skip
    assert told(leaking) == {"front: descriptors", "front: memory"}
    assert told([*flat, replace(IDLE, blocks=1)]) == {"blocks held when nobody asks"}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with serve("simulated", "simulated") as running:
        yield running


def test_a_daemon_is_after_its_faults_what_it_was_before(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "LINGER_S", 0.0)
    monkeypatch.setattr("benchmarks.soak.faults.ENGINE_EVERY_S", 0.0)
    faults = Faults(daemon, seed=1)
    before = soak.sample(daemon)
    kinds = (
        *(faults.helper_killed, faults.client_killed, faults.nonsense, faults.refused_requests),
        *(faults.cancels, faults.sessions_left, faults.reload, faults.engine_killed),
    )
    for kind in kinds:
        faults.do(kind)
    assert set(faults.done) == {kind.__name__ for kind in kinds}
    after = soak.sample(daemon)
    assert (after.blocks, after.swapped) == (0, 0)
    assert after.processes == before.processes
    assert "Traceback" not in daemon.log()
