"""Products in float8 for a network without gradients: the target encoder (arithmetic class E3, opt-in).

Weights are e4m3 with one scale per output column, made from the float32 average once per step; activations are e4m3 with
one scale per token, made as they come. Row scales need one pass over x, where a scale for the whole tensor needs two and is
coarser. The product is torch._scaled_mm with fast accumulation (tensor cores sum without promoting to float32 in between);
torchao wraps the same call in tensor subclasses, which we do without. Without tensor cores for float8 a CPU emulates it:
the same quantised numbers, multiplied in float32. Anything else is refused.
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
    """A Linear's weight in float8; `linear.fp8 = Float8Weight.of(linear.weight)` makes its products use it."""

    data: Tensor     # [out, in] float8_e4m3fn
    scale: Tensor    # [out] float32: weight = data * scale, row by row

    @classmethod
    def of(cls, weight: Tensor) -> "Float8Weight":
        return cls(*quantize_rows(weight.detach()))

    def __getitem__(self, rows: slice) -> "Float8Weight":
        """Some of the output columns, as weight[rows]."""
        return Float8Weight(self.data[rows], self.scale[rows])


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [P, D] -> float8 [P, D] and scale [P] float32, x = float8 * scale: the largest of each row becomes 448.

    Zeros stay zeros; a NaN or an infinity makes its whole row NaN in a product.
    """
    x = x.float()
    scale = x.abs().amax(1).clamp(min=1e-30) / LARGEST
    return (x / scale.unsqueeze(1)).to(DTYPE), scale


def linear(x: Tensor, weight: Float8Weight, bias: Tensor | None = None) -> Tensor:
    """x [P, in] -> [P, out]: F.linear with both factors in float8, in the dtype that F.linear would return."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if x.is_cuda:
        x8, scale = _fused_quantize_rows()(x)
        out = torch._scaled_mm(x8, weight.data.t(), scale.unsqueeze(1), weight.scale.unsqueeze(0),
                               out_dtype=torch.bfloat16, use_fast_accum=True).to(dtype)
        return out if bias is None else out + bias.to(dtype)
    x8, scale = quantize_rows(x)
    with torch.autocast(device, enabled=False):
        out = F.linear(x8.float(), weight.data.float()) * scale.unsqueeze(1) * weight.scale
        return (out if bias is None else out + bias).to(dtype)


def quantize_target_(encoder: nn.Module) -> None:
    """Give every Linear of the encoder's blocks a float8 weight, in use from then on; `refresh_` when weights change.

    Raises ValueError for a GPU without float8 tensor cores, an encoder without blocks, or sizes that scaled products do
    not take (multiples of 16).
    """
    linears = _linears(encoder)
    if not linears:
        raise ValueError(f"float8 is for encoders of transformer blocks, got {type(encoder).__name__}")
    _check_device(next(iter(linears.values())).weight.device)
    for name, module in linears.items():
        if module.in_features % 16 or module.out_features % 16:
            raise ValueError(f"float8 needs sizes that are multiples of 16, got {module.in_features} -> "
                             f"{module.out_features} in {name}")
        module.fp8 = Float8Weight.of(module.weight)


@torch.no_grad()
def refresh_(encoder: nn.Module) -> None:
    """Quantise the weights anew, into the same memory: once after every step of the average."""
    for module in _linears(encoder).values():
        data, scale = (_fused_quantize_rows() if module.weight.is_cuda else quantize_rows)(module.weight)
        module.fp8.data.copy_(data)
        module.fp8.scale.copy_(scale)


def _linears(encoder: nn.Module) -> dict[str, nn.Linear]:
    blocks = getattr(encoder, "blocks", nn.ModuleList())
    return {f"blocks.{name}": module for name, module in blocks.named_modules() if isinstance(module, nn.Linear)}


@functools.cache
def _fused_quantize_rows():
    """One pass over x instead of five."""
    return torch.compile(quantize_rows, dynamic=True)


def _check_device(device: torch.device) -> None:
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise ValueError(f"float8 products are for CUDA, and for the CPU as an emulation, got {device}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ValueError(f"float8 needs tensor cores of sm_89 or newer, {device} is sm_{capability[0]}{capability[1]}")
