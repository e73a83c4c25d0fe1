"""GPU tests: run by `make test-gpu`, and never passed by not having run."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _device() -> None:
    """A missing device fails every test here."""
    if not torch.cuda.is_available():
        pytest.fail("no CUDA device", pytrace=False)
