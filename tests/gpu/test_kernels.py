"""Every kernel on a CUDA device, against the references."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_checks import Target, checks, gpu_checks, lone_checks

pytestmark = pytest.mark.gpu
TYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", checks(Target("cuda", torch.bfloat16)))
def test_a_kernel_gives_what_its_reference_gives(name: str, dtype: torch.dtype) -> None:
    checks(Target("cuda", dtype))[name]()


DEVICE_ONLY = gpu_checks(Target("cuda", torch.bfloat16)) | lone_checks(
    Target("cuda", torch.bfloat16)
)


@pytest.mark.parametrize("name", DEVICE_ONLY)
def test_a_device_does_what_the_interpreter_cannot(name: str) -> None:
    DEVICE_ONLY[name]()
