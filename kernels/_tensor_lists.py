"""Lists of tensors in one launch: a table of sizes and addresses on the device, and blocks of numbers that find theirs.

The table is int64 [columns, tensors]: column 0 is the number of elements, column 1 the first block, the rest are the
caller's, mostly addresses. It is made and copied once for as long as the same numbers come back, step after step.
"""

import functools
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # numbers per program


@triton.jit
def locate(table_ptr, tensor_of_block_ptr, num_tensors, IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """-> where this program's tensor is in column 0, offsets [BLOCK] of its numbers, mask [BLOCK]."""
    pid = tl.program_id(0).to(tl.int64)
    entry_ptr = table_ptr + tl.load(tensor_of_block_ptr + pid)
    offs = (pid - tl.load(entry_ptr + num_tensors)) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(entry_ptr)
    if IS_ALIGNED:
        size = tl.multiple_of(size, 16)
    return entry_ptr, offs, offs < size


@triton.jit
def address(entry_ptr, num_tensors, COLUMN: tl.constexpr, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    pointer = tl.load(entry_ptr + COLUMN * num_tensors).to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def to_device(values, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers from the host, without waiting for the device; a CUDA graph would copy from memory that is long gone."""
    if is_capturing(device):
        raise RuntimeError("what a CUDA graph captures must be adamw_ema_scalars_, whose numbers are on the device, "
                           "with lists that it was called with before the capture")
    values = torch.as_tensor(values, dtype=dtype)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


@functools.lru_cache(maxsize=16)
def _blocks(device: torch.device, sizes: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """Which tensor each block belongs to [blocks], and the first block of each tensor."""
    counts = [triton.cdiv(size, BLOCK) for size in sizes]
    tensor_of_block = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    return to_device(tensor_of_block, torch.int32, device), tuple(itertools.accumulate(counts, initial=0))


@functools.lru_cache(maxsize=16)
def table(device: torch.device, sizes: tuple[int, ...], *columns: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """-> table [2 + len(columns), len(sizes)] int64, tensor of each block."""
    tensor_of_block, first = _blocks(device, sizes)
    return to_device([sizes, first[:-1], *columns], torch.int64, device), tensor_of_block


def addresses(tensors: list[Tensor], length: int) -> tuple[int, ...]:
    """Where the tensors begin; 0 for those up to `length` that there are not."""
    return tuple(t.data_ptr() for t in tensors) + (0,) * (length - len(tensors))


def split(dtypes: list[torch.dtype], sizes: list[int], *columns: tuple[int, ...]) -> dict[tuple, list[int]]:
    """(dtype, 16 numbers or bytes may be taken at once) -> the tensors of which that is true, without empty ones."""
    groups = {}
    for i, (dtype, size, *row) in enumerate(zip(dtypes, sizes, *columns, strict=True)):
        if size:
            groups.setdefault((dtype, all(value % 16 == 0 for value in (size, *row))), []).append(i)
    return groups
