"""Device memory that torch shall see and not own."""

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
