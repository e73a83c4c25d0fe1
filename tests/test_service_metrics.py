"""Figures for Prometheus: what they say, and who may ask for them."""

from __future__ import annotations

import http.client
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pagedd.cli._app import CommandError
from pagedd.cli._metrics import loopback
from pagedd_daemon.front.energy import Energy
from pagedd_daemon.front.measures import Histogram
from tests.support.daemon import RunningDaemon, running_daemon


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon() as running:
        yield running


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every figure, by name and labels; fails for what is no Prometheus text, or said twice."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def labels(**values: str) -> frozenset[tuple[str, str]]:
    return frozenset(values.items())


def test_every_request_is_in_the_histograms_and_counters(daemon: RunningDaemon) -> None:
    with daemon.control() as control:
        before = samples(control.metrics())
        with daemon.connect("my-editor", "interactive") as client:
            for _ in range(3):
                client.complete("hello", max_tokens=5, ignore_eos=True)
        after = samples(control.metrics())
    klass = labels(**{"class": "interactive"})
    for name, count in (("time_to_first_token", 3), ("queue_wait", 3), ("inter_token", 12)):
        key = (f"pagedd_{name}_seconds_count", klass)
        assert after[key] - before[key] == count
        most = (f"pagedd_{name}_seconds_bucket", klass | labels(le="+Inf"))
        assert after[most] == after[key]
        assert after[(f"pagedd_{name}_seconds_sum", klass)] > 0
    (program,) = {dict(key[1])["program"] for key in after if ("app", "my-editor") in key[1]}
    app = labels(app="my-editor", program=program)
    assert after[("pagedd_requests_ended_total", app | labels(outcome="finished"))] == 3
    assert after[("pagedd_tokens_total", app | labels(kind="generated"))] == 15
    blocks = {dict(key[1])["tier"] for key in after if key[0] == "pagedd_blocks"}
    assert blocks == {"gpu", "ram", "disk"}


def test_the_documentation_names_every_metric(daemon: RunningDaemon) -> None:
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    with daemon.control() as control:
        names = {f.name for f in text_string_to_metric_families(control.metrics())}
    missing = {name for name in names if f"`{name}`" not in page and f"`{name}_total`" not in page}
    assert missing == set()


def test_they_are_served_on_the_loopback_interface_and_to_nobody_elses_page(
    daemon: RunningDaemon,
) -> None:
    process = subprocess.Popen(
        # As scripts start what they leave in the background: it must end by SIGTERM all the same.
        [
            *("env", "--ignore-signal=INT", sys.executable),
            *("-m", "pagedd", "metrics", "--listen", "127.0.0.1:0"),
        ],
        env=daemon.env,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        port = int(process.stderr.readline().rpartition(":")[2].partition("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

        def get(path: str, **headers: str) -> tuple[int, str]:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        status, text = get("/metrics")
        assert status == 200
        assert samples(text)
        assert get("/other")[0] == 404
        assert get("/metrics", Host="rebound.example:80")[0] == 403
        connection.close()
        process.terminate()
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("listen", ["0.0.0.0:9178", "192.168.0.2:80", "9178", "127.0.0.1:x", ":-1"])
def test_no_other_interface_is_listened_at(listen: str) -> None:
    with pytest.raises(CommandError) as caught:
        loopback(listen)
    assert caught.value.exit_code == 64


def test_loopback_addresses_are_taken() -> None:
    assert loopback("localhost:1") == ("127.0.0.1", 1)
    assert loopback("[::1]:9178") == ("::1", 9178)
    assert loopback(":9178") == ("127.0.0.1", 9178)


def test_a_histogram_counts_by_upper_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.add(1.0, 2)
    histogram.add(5.0)
    assert histogram.cumulative() == [("1", 2.0), ("2", 2.0), ("+Inf", 3.0)]
    assert histogram.sum == 7.0


def test_energy_is_read_where_it_may_be_and_left_out_elsewhere(tmp_path: Path) -> None:
    for number, content in ((0, "5000000"), (1, "no number")):
        zone = tmp_path / f"intel-rapl:{number}"
        zone.mkdir()
        (zone / "name").write_text(f"package-{number}\n")
        (zone / "energy_uj").write_text(content)
    energy = Energy(tmp_path)
    assert dict(energy.read()) == {"package-0": 5.0}
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert dict(energy.read()) == {}
    nothing = Energy(tmp_path / "none")
    assert not nothing.silent
    nothing.read()
    assert nothing.silent
