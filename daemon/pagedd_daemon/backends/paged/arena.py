"""The pool's memory: one tensor at one address, of which more or less is really there.

Freeing blocks gives no memory back to the desktop; unmapping it does. On CUDA an address range for
the largest pool is reserved once, and segments of physical memory are mapped into it from the front
and unmapped from its end: addresses never change, so neither tensors nor captured graphs do. A
segment maps in 0.05 ms and unmaps in 0.09 (H200). Where the driver offers no virtual memory
management, and on the CPU, the pool is a plain allocation that keeps its size.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pagedd_daemon.backends.paged.device_memory import DeviceRange

log = logging.getLogger(__name__)

SEGMENT_BYTES = 64 << 20
"""Physical memory comes in pieces of this size: 0.1 ms for each, and little left over."""
PADDING_BLOCKS = 1
"""Block 0 takes what padding rows write. It lies in the first segment, which is never released."""


@dataclass(frozen=True, slots=True)
class PoolShape:
    """What a block holds."""

    layers: int
    block_tokens: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        values = self.layers * 2 * self.block_tokens * self.kv_heads * self.head_dim
        return values * self.dtype.itemsize

    def tensor_shape(self, blocks: int) -> tuple[int, ...]:
        """Shape of a pool of ``blocks``, the padding block included."""
        return (blocks, self.layers, 2, self.block_tokens, self.kv_heads, self.head_dim)


class ArenaMemoryError(Exception):
    """The device has not enough memory for what was asked."""


class Arena(Protocol):
    """Memory of a pool of at most so many blocks."""

    @property
    def kv(self) -> Tensor:
        """``[1 + most blocks, layers, 2, block_tokens, kv_heads, head_dim]``. Only the first
        `blocks` and the padding block may be touched."""
        ...

    @property
    def blocks(self) -> int:
        """Blocks that are there now, the padding block not counted."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes of device memory it holds."""
        ...

    @property
    def elastic(self) -> bool:
        """Whether `resize` changes anything."""
        ...

    def resize(self, blocks: int) -> int:
        """Have room for ``blocks``, and for as few more as may be.

        New memory is zeroed, in the current stream: a slot that was never written must not be NaN.
        The caller sees to it that nothing on the device still uses blocks that go.

        Returns:
            Blocks that are there now: fewer than asked where the device has no more, more where
            memory comes in larger pieces or in one.
        """
        ...

    def close(self) -> None:
        """Give it all back. Idempotent; `kv` may not be used any more."""
        ...


class PlainArena:
    """A pool that is allocated once."""

    def __init__(self, shape: PoolShape, blocks: int, device: torch.device) -> None:
        """A zeroed pool.

        Raises:
            ArenaMemoryError: It does not fit.
        """
        self._blocks = blocks
        size = shape.tensor_shape(blocks + PADDING_BLOCKS)
        try:
            self.kv = torch.zeros(size, dtype=shape.dtype, device=device)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise ArenaMemoryError(str(error)) from error

    @property
    def blocks(self) -> int:
        """See `Arena`."""
        return self._blocks

    @property
    def bytes(self) -> int:
        """See `Arena`."""
        return self.kv.nbytes

    @property
    def elastic(self) -> bool:
        """See `Arena`."""
        return False

    def resize(self, blocks: int) -> int:
        """See `Arena`; always the same size."""
        return self._blocks

    def close(self) -> None:
        """See `Arena`."""
        self._blocks = 0
        self.kv = torch.empty(0)


class VirtualArena:
    """A pool over CUDA virtual memory (CUDA driver API, "Virtual Memory Management")."""

    def __init__(self, shape: PoolShape, most_blocks: int, device: torch.device) -> None:
        """Reserve addresses for ``most_blocks``, and memory for the first.

        Raises:
            ArenaMemoryError: Not even the padding block and one more fit.
            RuntimeError: The driver offers no virtual memory management.
        """
        from cuda.bindings import driver

        self._driver: Any = driver
        torch.cuda.init()
        torch.empty(1, device=device)  # makes the device's context current in this thread
        self._block_bytes = shape.block_bytes
        self._most = most_blocks
        self._segment = SEGMENT_BYTES
        self._properties = self._allocation(device.index or 0)
        flag = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        grain = self._ask(driver.cuMemGetAllocationGranularity(self._properties, flag))
        assert self._segment % int(grain) == 0
        whole = (most_blocks + PADDING_BLOCKS) * self._block_bytes
        self._size = -(-whole // self._segment) * self._segment
        self._address = int(self._ask(driver.cuMemAddressReserve(self._size, 0, 0, 0)))
        self._handles: list[Any] = []
        self._raw: Tensor | None = None
        self._grow(self._segments_for(1))
        if not self._handles:
            self.close()
            raise ArenaMemoryError(f"no {self._segment} bytes of device memory are free")
        self._raw = torch.as_tensor(DeviceRange(self._address, self._size), device=device)
        assert self._raw.data_ptr() == self._address
        self._raw[: len(self._handles) * self._segment].zero_()
        values = self._raw[:whole].view(shape.dtype)
        self.kv = values.view(shape.tensor_shape(most_blocks + PADDING_BLOCKS))

    @property
    def blocks(self) -> int:
        """See `Arena`."""
        there = len(self._handles) * self._segment // self._block_bytes - PADDING_BLOCKS
        return max(0, min(there, self._most))

    @property
    def bytes(self) -> int:
        """See `Arena`."""
        return len(self._handles) * self._segment

    @property
    def elastic(self) -> bool:
        """See `Arena`."""
        return True

    def resize(self, blocks: int) -> int:
        """See `Arena`."""
        assert self._raw is not None
        wanted = self._segments_for(min(blocks, self._most))
        had = len(self._handles)
        if wanted > had:
            self._grow(wanted)
            now = len(self._handles)
            if now > had:
                self._raw[had * self._segment : now * self._segment].zero_()
        else:
            self._shrink(max(wanted, self._segments_for(1)))
        return self.blocks

    def close(self) -> None:
        """See `Arena`."""
        if self._address:
            torch.cuda.synchronize()
            self._raw = None
            self._shrink(0)
            self._ask(self._driver.cuMemAddressFree(self._address, self._size))
            self._address = 0
            self.kv = torch.empty(0)

    # -------------------------------------------------------------------------------- segments

    def _segments_for(self, blocks: int) -> int:
        return -(-(blocks + PADDING_BLOCKS) * self._block_bytes // self._segment)

    def _grow(self, segments: int) -> None:
        """Map segments until there are so many or the device has no more."""
        driver = self._driver
        while len(self._handles) < segments:
            status, handle = driver.cuMemCreate(self._segment, self._properties, 0)
            if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
                return
            self._ask((status, handle))
            at = self._address + len(self._handles) * self._segment
            self._ask(driver.cuMemMap(at, self._segment, 0, handle, 0))
            self._ask(driver.cuMemSetAccess(at, self._segment, [self._access], 1))
            self._handles.append(handle)

    def _shrink(self, segments: int) -> None:
        while len(self._handles) > segments:
            handle = self._handles.pop()
            at = self._address + len(self._handles) * self._segment
            self._ask(self._driver.cuMemUnmap(at, self._segment))
            self._ask(self._driver.cuMemRelease(handle))

    def _allocation(self, device: int) -> Any:
        driver = self._driver
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = device
        self._access = driver.CUmemAccessDesc()
        self._access.location = properties.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        return properties

    def _ask(self, answer: Any) -> Any:
        """What a driver call answered.

        Raises:
            RuntimeError: It failed.
        """
        status, *values = answer
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the CUDA driver answered {status.name}")
        return values[0] if values else None


def make_arena(
    shape: PoolShape, most_blocks: int, blocks: int, device: torch.device
) -> PlainArena | VirtualArena:
    """The memory of a pool.

    Where it can grow it is as small as can be at first, so that what else needs memory finds it:
    `Arena.resize` then. Else it has ``blocks`` at once.

    Args:
        shape: What a block holds.
        most_blocks: Blocks a pool that can grow may have one day.
        blocks: Blocks of one that cannot.
        device: Where.

    Raises:
        ArenaMemoryError: There is not enough memory.
    """
    if device.type == "cuda":
        try:
            return VirtualArena(shape, most_blocks, device)
        except (ImportError, RuntimeError) as error:
            log.warning("the pool keeps its size: no CUDA virtual memory (%s)", error)
    return PlainArena(shape, blocks, device)
