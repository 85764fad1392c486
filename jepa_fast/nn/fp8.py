"""Products in float8 for a network without gradients: the target encoder (arithmetic class E3, opt-in).

Weights are e4m3 with one scale per output column, made from the float32 average once per step; activations are e4m3 with
one scale per token, made as they come. Row scales need one pass over x, where a scale for the whole tensor needs two and is
coarser. The product is torch._scaled_mm with fast accumulation (tensor cores sum without promoting to float32 in between);
torchao wraps the same call in tensor subclasses, which we do without. A CPU emulates it: the same quantised numbers,
multiplied in float32. GPUs without float8 tensor cores are refused. The last block stays in the precision of the step: only
the rows of targets go through it.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max  # 448


@dataclass(frozen=True, eq=False)
class Float8Weight:
    """A Linear's weight, data * scale; a block that finds one among its weights asks it for the product."""

    data: Tensor     # [out, in] float8_e4m3fn
    scale: Tensor    # [out] float32

    @classmethod
    def of(cls, weight: Tensor) -> "Float8Weight":
        return cls(*quantize_rows(weight.detach()))

    def fill_(self, weight: Tensor) -> None:
        """Quantise a weight into the same memory."""
        data, scale = _quantize(weight)
        self.data.copy_(data)
        self.scale.copy_(scale)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [P, in] -> [P, out] in x's dtype: F.linear with both factors in float8."""
        x8, scale = _quantize(x)
        if x.is_cuda:
            return self._product(x8, scale, bias).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            out = F.linear(x8.float(), self.data.float()) * scale.unsqueeze(1) * self.scale
            return (out if bias is None else out + bias).to(x.dtype)

    def _product(self, x8: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """On tensor cores; with row scales these give bfloat16 only."""
        bias = None if bias is None else bias.to(torch.bfloat16)
        return torch._scaled_mm(x8, self.data.t(), scale.unsqueeze(1), self.scale.unsqueeze(0), bias=bias,
                                out_dtype=torch.bfloat16, use_fast_accum=True)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [P, D] -> float8 [P, D] and scale [P] float32, x = float8 * scale: the largest of each row becomes 448.

    Zeros stay zeros; a NaN or an infinity makes its whole row NaN in a product.
    """
    x = x.float()
    scale = x.abs().amax(1).clamp(min=1e-30) / LARGEST
    return (x / scale.unsqueeze(1)).to(DTYPE), scale


@functools.cache
def _fused_quantize_rows():
    """One pass over x instead of five."""
    return torch.compile(quantize_rows, dynamic=True)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    return _fused_quantize_rows()(x) if x.is_cuda else quantize_rows(x)


def quantize_(encoder: nn.Module) -> None:
    """Let all blocks of the encoder but the last multiply in float8 from now on; `refresh_` when weights change.

    Raises ValueError for a GPU without float8 tensor cores, for an encoder without blocks, and for sizes that scaled
    products do not take.
    """
    blocks = getattr(encoder, "blocks", [])[:-1]
    if not len(blocks):
        raise ValueError(f"float8 is for encoders of two transformer blocks or more, got {type(encoder).__name__} "
                         f"with {len(getattr(encoder, 'blocks', []))}")
    _check_device(next(encoder.parameters()).device)
    for number, block in enumerate(blocks):
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        for name, module in linears.items():
            if module.in_features % 16 or module.out_features % 16:
                raise ValueError(f"float8 needs sizes that are multiples of 16, got {module.in_features} -> "
                                 f"{module.out_features} in blocks.{number}.{name}")
        block.float8 = {module.weight: Float8Weight.of(module.weight) for module in linears.values()}


@torch.no_grad()
def refresh_(encoder: nn.Module) -> None:
    """Quantise the weights anew, into the same memory: once after every step of the average."""
    for block in encoder.blocks[:-1]:
        for weight, float8 in block.float8.items():
            float8.fill_(weight)


def _check_device(device: torch.device) -> None:
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise ValueError(f"float8 products are for CUDA, and for the CPU as an emulation, got {device}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ValueError(f"float8 needs tensor cores of sm_89 or newer, {device} is sm_{capability[0]}{capability[1]}")
