"""SIGReg without slices: the expectation over all directions, in closed form."""

import torch
from torch import Tensor

from ..reference import sigreg_exact as reference
from ..reference.quadrature import Quadrature
from ..reference.sigreg import accumulation_dtype
from ._backends import Missing
from ._define import define
from .sigreg import OFFICIAL, check_choice, check_rows, count_rows, to_groups

_NO_OTHER = dict.fromkeys(("cpp", "triton", "cuda"), Missing("float64 products, which plain PyTorch leaves to BLAS"))

define("sigreg_exact(Tensor x, Tensor? row_mask, float t_start, float t_step, float[] phi, float[] weights) -> Tensor",
       plain=reference.sigreg_exact, **_NO_OTHER)
define("sigreg_exact_backward(Tensor grad, Tensor x, Tensor? row_mask, float t_start, float t_step, float[] phi, "
       "float[] weights) -> Tensor",
       plain=reference.sigreg_exact_backward, **_NO_OTHER)


@torch.library.register_fake("jepa_fast::sigreg_exact")
def _(x, row_mask, t_start, t_step, phi, weights):
    return x.new_empty(x.shape[0], dtype=accumulation_dtype(x))


@torch.library.register_fake("jepa_fast::sigreg_exact_backward")
def _(grad, x, row_mask, t_start, t_step, phi, weights):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    x, row_mask, *ctx.quadrature = inputs
    ctx.save_for_backward(x, row_mask)


def _backward(ctx, grad):
    if torch.is_grad_enabled():  # create_graph: the graph would end here without a word
        raise RuntimeError("sigreg_exact cannot be differentiated twice")
    x, row_mask = ctx.saved_tensors
    grad_x = torch.ops.jepa_fast.sigreg_exact_backward(grad, x.detach(), row_mask, *ctx.quadrature)
    return grad_x, None, None, None, None, None


torch.library.register_autograd("jepa_fast::sigreg_exact", _backward, setup_context=_save)


def sigreg_exact(x: Tensor, *, quadrature: Quadrature = OFFICIAL, row_mask: Tensor | None = None,
                 group_dims: str = "leading", scale: str | float = "N", reduction: str | None = "mean") -> Tensor:
    """What `sigreg` estimates with random directions: its expectation over all of them. No slices, no noise, no step.

    Not a drop-in for published results: with K slices the gradient is noisy (1024 slices of 128 dims: cosine 0.86 to
    this one), and recipes were tuned with that noise. x [..., N, D], any D >= 1 -> scalar float32 (float64 for
    float64), or one value per group for reduction None. Options as in `sigreg`; scale "N", "none" or a number; rows of
    this process only. Computed in float64 from the N^2 distances of a group, some hundred thousand at a time: cheaper
    than slices where N is below their number. Slow below 10 dims, where its kernel is evaluated knot by knot.
    """
    check_rows(x, row_mask, group_dims)
    check_choice("reduction", reduction, ("mean", "sum", None))
    if isinstance(scale, str):
        check_choice("scale", scale, ("N", "none"))
    lead, x, row_mask = to_groups(x, row_mask, group_dims)
    statistic = torch.ops.jepa_fast.sigreg_exact(x, row_mask, quadrature.t_start, quadrature.t_step, quadrature.phi,
                                                 quadrature.weights)
    if scale != "none":
        statistic = statistic * (count_rows(x, row_mask, statistic.dtype) if scale == "N" else scale)
    if reduction is None:
        return statistic.reshape(lead)
    return statistic.mean() if reduction == "mean" else statistic.sum()
