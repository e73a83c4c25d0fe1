"""Device memory: how much there is, that there was none, and some that torch shall not own."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceRange:
    """A range of device memory as an object that torch can make a tensor of."""

    def __init__(self, address: int, size: int) -> None:
        """``size`` bytes, which must stay where they are while a tensor looks at them."""
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def borrowed(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that does not keep it from being used for something else."""
    assert tensor.is_contiguous()
    raw = torch.as_tensor(DeviceRange(tensor.data_ptr(), tensor.nbytes), device=tensor.device)
    return raw.view(tensor.dtype).view(tensor.shape)


_NO_MEMORY = ("out of memory", "ALLOC_FAILED")
"""What libraries say that allocate by themselves: the driver, Triton, cuBLAS."""


def ran_out(error: RuntimeError) -> bool:
    """Whether an error means that the device has no memory, whoever asked for it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _NO_MEMORY)


def free_bytes(device: torch.device) -> int:
    """Bytes that nobody has: of a CUDA device as the driver sees it, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def total_bytes(device: torch.device) -> int:
    """Bytes of the CUDA device, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().total
