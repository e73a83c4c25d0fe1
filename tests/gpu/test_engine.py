"""The paged engine on a CUDA device: what `benchmarks.gpu.checks` says must hold."""

from __future__ import annotations

import pytest

from benchmarks.gpu.checks import texts_against_cpu
from benchmarks.report import Report

pytestmark = pytest.mark.gpu


def test_the_engine_on_cuda_agrees_with_the_cpu_and_keeps_every_page() -> None:
    report = Report("gpu-test", quick=False)
    texts_against_cpu(report)
    assert [row for row in report.rows if not row.ok] == []
