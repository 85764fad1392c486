"""SIGReg: how far embeddings are from a standard normal along random directions, without the [N, K, J] tensor."""

import math

import torch
from torch import Tensor

from ..reference import sigreg as reference
from ..reference.quadrature import Quadrature
from . import _sigreg_cpu as native
from ._backends import Missing, compiled, triton
from ._define import define
from ._distributed import resolve_group, sum_over_ranks
from .directions import directions as draw_directions

OFFICIAL = Quadrature.half_line(3.0, 17)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_CUDA = Missing("Triton's is bound by arithmetic, not by what CUDA could save; not measured yet")
_GIVEN = Missing("its projections are made by PyTorch; sigreg makes them where they are used")
_CUDA_STATISTIC = Missing("Triton's is one short launch")

define("sigreg_sums(Tensor x, Tensor directions, Tensor? row_mask, float t_start, float t_step, SymInt num_knots) "
       "-> Tensor",
       plain=reference.sigreg_sums, cpp=compiled("sigreg_add_sums", _FLOATS, native.sigreg_sums),
       triton=triton("sigreg.sigreg_sums"), cuda=_CUDA)
define("sigreg_sums_backward(Tensor grad_sums, Tensor x, Tensor directions, Tensor? row_mask, float t_start, "
       "float t_step) -> Tensor",
       plain=reference.sigreg_sums_backward, cpp=compiled("sigreg_gradient_", _FLOATS, native.sigreg_sums_backward),
       triton=triton("sigreg.sigreg_sums_backward"), cuda=_CUDA)
define("projection_sums(Tensor p, float t_start, float t_step, SymInt num_knots) -> Tensor",
       plain=reference.projection_sums, cpp=compiled("sigreg_add_sums", _FLOATS, native.projection_sums),
       triton=_GIVEN, cuda=_GIVEN)
define("projection_sums_backward(Tensor grad_sums, Tensor p, float t_start, float t_step) -> Tensor",
       plain=reference.projection_sums_backward, cpp=compiled("sigreg_gradient_", _FLOATS, native.projection_sums_backward),
       triton=_GIVEN, cuda=_GIVEN)
define("sigreg_statistic(Tensor sums, Tensor count, float[] phi, float[] weights) -> Tensor",
       plain=reference.sigreg_statistic, cpp=compiled("sigreg_statistic", (torch.float32,), native.sigreg_statistic),
       triton=triton("sigreg_statistic.sigreg_statistic", (torch.float32,)), cuda=_CUDA_STATISTIC)
define("sigreg_statistic_backward(Tensor grad, Tensor sums, Tensor count, float[] phi, float[] weights) -> Tensor",
       plain=reference.sigreg_statistic_backward,
       cpp=compiled("sigreg_statistic_backward", (torch.float32,), native.sigreg_statistic_backward),
       triton=triton("sigreg_statistic.sigreg_statistic_backward", (torch.float32,)), cuda=_CUDA_STATISTIC)


@torch.library.register_fake("jepa_fast::sigreg_sums")
def _(x, directions, row_mask, t_start, t_step, num_knots):
    return x.new_empty(x.shape[0], 2, num_knots, directions.shape[1], dtype=reference.accumulation_dtype(x))


@torch.library.register_fake("jepa_fast::sigreg_sums_backward")
def _(grad_sums, x, directions, row_mask, t_start, t_step):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("jepa_fast::projection_sums")
def _(p, t_start, t_step, num_knots):
    return p.new_empty(p.shape[0], 2, num_knots, p.shape[2], dtype=reference.accumulation_dtype(p))


@torch.library.register_fake("jepa_fast::projection_sums_backward")
def _(grad_sums, p, t_start, t_step):
    return torch.empty_like(p, memory_format=torch.contiguous_format)


@torch.library.register_fake("jepa_fast::sigreg_statistic")
def _(sums, count, phi, weights):
    return sums.new_empty(sums.shape[0], sums.shape[3])


@torch.library.register_fake("jepa_fast::sigreg_statistic_backward")
def _(grad, sums, count, phi, weights):
    return torch.empty_like(sums, memory_format=torch.contiguous_format)


def _save_sums(ctx, inputs, output):
    x, directions, row_mask, *ctx.grid, _ = inputs
    ctx.save_for_backward(x, directions, row_mask)


def _sums_backward(ctx, grad):
    _refuse_second_derivative()
    x, directions, row_mask = ctx.saved_tensors
    grad_x = torch.ops.jepa_fast.sigreg_sums_backward(grad, x.detach(), directions, row_mask, *ctx.grid)
    return grad_x, None, None, None, None, None


def _save_projections(ctx, inputs, output):
    p, *ctx.grid, _ = inputs
    ctx.save_for_backward(p)


def _projection_sums_backward(ctx, grad):
    _refuse_second_derivative()
    (p,) = ctx.saved_tensors
    return torch.ops.jepa_fast.projection_sums_backward(grad, p.detach(), *ctx.grid), None, None, None


def _save_statistic(ctx, inputs, output):
    sums, count, ctx.phi, ctx.weights = inputs
    ctx.save_for_backward(sums, count)


def _statistic_backward(ctx, grad):
    _refuse_second_derivative()
    sums, count = ctx.saved_tensors
    grad_sums = torch.ops.jepa_fast.sigreg_statistic_backward(grad, sums.detach(), count, ctx.phi, ctx.weights)
    return grad_sums, None, None, None


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # create_graph: the graph would end here without a word
        raise RuntimeError("sigreg cannot be differentiated twice")


torch.library.register_autograd("jepa_fast::sigreg_sums", _sums_backward, setup_context=_save_sums)
torch.library.register_autograd("jepa_fast::projection_sums", _projection_sums_backward, setup_context=_save_projections)
torch.library.register_autograd("jepa_fast::sigreg_statistic", _statistic_backward, setup_context=_save_statistic)


def sigreg(x: Tensor, directions: Tensor | None = None, *, quadrature: Quadrature = OFFICIAL,
           num_slices: int = 1024, seed: int = 0, step: int | Tensor | None = None, rng: str = "philox",
           row_mask: Tensor | None = None, group_dims: str = "leading", scale: str | float = "N_global",
           reduction: str | None = "mean", clip: float | None = None, process_group=None,
           ddp_weighting: str = "sample", upstream_sync: bool = False) -> Tensor:
    """SIGReg of embeddings x [..., N, D]; float32 (float64 for float64 x), also for half precision and under autocast.

    directions [D, K]: used as they are, no gradient; else `num_slices` are drawn from (seed, step), see `directions`.
    For half-precision x the Triton kernels round them to its dtype, for value and gradient alike.
    row_mask [..., N] bool: rows that count; the others get no gradient and may hold anything, NaN included.
    group_dims: "leading": every index into the leading dims (views, time steps) is a group; "flatten": all are one.
    scale: factor of the statistic: "N" rows of the group on this rank, "N_global" on all ranks, "none" or a number.
    reduction: "mean" or "sum" over groups and slices, or None -> [..., K] ([K] for x [N, D] and for "flatten").
    clip: statistics below it count as 0 and pass no gradient.  A group without any row has statistic 0.
    process_group: None, "auto" (all ranks, where torch.distributed is initialised), "world" or a ProcessGroup: one SUM
    all-reduce makes value and (after DDP's mean) gradient those of the global batch. All ranks need the same groups,
    directions and upstream gradient; where the last differs (scale "N" with uneven ranks), set upstream_sync.
    ddp_weighting: "sample" weights rows equally, "rank" ranks equally (official); the same where ranks have equal rows.
    NaN and infinity in x reach the loss. Raises ValueError for wrong shapes, options or an uninitialised process group.
    LeJEPA, arXiv:2511.08544; variants as in nn.SIGReg.from_preset.
    """
    _check(x, directions, row_mask, group_dims, scale, reduction, ddp_weighting)
    group = resolve_group(process_group)
    if directions is None:
        if step is None:
            raise ValueError("sigreg needs directions, or step to draw them")
        directions = draw_directions(seed, step, x.shape[-1], num_slices, rng, x.device)
    lead, x, row_mask = to_groups(x, row_mask, group_dims)
    sums = torch.ops.jepa_fast.sigreg_sums(x, directions.to(reference.accumulation_dtype(x)), row_mask,
                                           quadrature.t_start, quadrature.t_step, quadrature.num_knots)
    rows = count_rows(x, row_mask, sums.dtype)
    statistic = _statistic(sums, rows, quadrature, scale, group, ddp_weighting, upstream_sync)
    if clip is not None:
        statistic = torch.where(statistic < clip, 0, statistic)
    if reduction is None:
        return statistic.reshape(*lead, statistic.shape[-1])
    return statistic.mean() if reduction == "mean" else statistic.sum()


def epps_pulley(projections: Tensor, *, quadrature: Quadrature = OFFICIAL, scale: str | float = "N_global",
                process_group=None, ddp_weighting: str = "sample", upstream_sync: bool = False) -> Tensor:
    """The statistic of projections [..., N, K] that exist already -> [..., K]; its options are those of `sigreg`.

    Without the [..., N, K, J] tensor; where the embeddings are at hand, `sigreg` does not need the projections either.
    """
    _check(projections, None, None, "leading", scale, None, ddp_weighting)
    group = resolve_group(process_group)
    lead, p, _ = to_groups(projections, None, "leading")
    sums = torch.ops.jepa_fast.projection_sums(p, quadrature.t_start, quadrature.t_step, quadrature.num_knots)
    rows = count_rows(p, None, sums.dtype)
    statistic = _statistic(sums, rows, quadrature, scale, group, ddp_weighting, upstream_sync)
    return statistic.reshape(*lead, statistic.shape[-1])


def _statistic(sums: Tensor, rows: Tensor, quadrature: Quadrature, scale: str | float, group, ddp_weighting: str,
               upstream_sync: bool) -> Tensor:
    """[V, K], scaled, of the sums and rows of this rank."""
    rows_global = count = rows
    if group is not None:
        sums, count, rows_global = _over_ranks(sums, rows, group, ddp_weighting, upstream_sync)
    statistic = torch.ops.jepa_fast.sigreg_statistic(sums, count, quadrature.phi, quadrature.weights)
    if scale == "none":
        return statistic
    factors = {"N": rows, "N_global": rows_global}
    return statistic * (factors[scale].unsqueeze(-1) if scale in factors else scale)


def to_groups(x: Tensor, row_mask: Tensor | None, group_dims: str) -> tuple[tuple, Tensor, Tensor | None]:
    """The leading dims that are groups, and everything as [V, N, D] and [V, N]; V = 1 without such dims."""
    lead = () if group_dims == "flatten" else tuple(x.shape[:-2])
    V, N = math.prod(lead), math.prod(x.shape[len(lead):-1])
    return lead, x.reshape(V, N, x.shape[-1]), None if row_mask is None else row_mask.reshape(V, N)


def count_rows(x: Tensor, row_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows of each group, [V]; float32 is exact up to 2^24."""
    if row_mask is None:
        return x.new_full((x.shape[0],), x.shape[1], dtype=dtype)
    return row_mask.sum(1).to(dtype)


def _over_ranks(sums: Tensor, rows: Tensor, group, weighting: str, upstream_sync: bool) -> tuple[Tensor, ...]:
    """Sums and what to divide them by, over all ranks, and the rows of all ranks; one all-reduce."""
    has_rows = (rows > 0).to(rows.dtype)
    if weighting == "rank":  # means of the ranks, each with weight 1
        sums = sums / torch.where(rows > 0, rows, 1)[:, None, None, None]
    packed = sum_over_ranks(torch.cat([sums.flatten(), rows, has_rows]), group, upstream_sync)
    total, rows, ranks = packed.split([sums.numel(), rows.numel(), rows.numel()])
    rows = rows.detach()
    return total.view(sums.shape), ranks.detach() if weighting == "rank" else rows, rows


def _check(x, directions, row_mask, group_dims, scale, reduction, ddp_weighting) -> None:
    check_rows(x, row_mask, group_dims)
    check_choice("reduction", reduction, ("mean", "sum", None))
    check_choice("ddp_weighting", ddp_weighting, ("rank", "sample"))
    if isinstance(scale, str):
        check_choice("scale", scale, ("N", "N_global", "none"))
    if directions is None:
        return
    if directions.dim() != 2 or directions.shape[0] != x.shape[-1] or not directions.is_floating_point():
        raise ValueError(f"directions must be floating point [D, K] with D = {x.shape[-1]}, "
                         f"got {list(directions.shape)} {directions.dtype}")
    if directions.requires_grad:
        raise ValueError("directions are constants here and must not require a gradient; detach them")
    if directions.device != x.device:
        raise ValueError(f"directions must be on the device of x, {x.device}, got {directions.device}")


def check_rows(x: Tensor, row_mask: Tensor | None, group_dims: str) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [..., N, D], got {list(x.shape)} {x.dtype}")
    if row_mask is not None and (row_mask.shape != x.shape[:-1] or row_mask.dtype != torch.bool):
        raise ValueError(f"row_mask must be {list(x.shape[:-1])} bool, got {list(row_mask.shape)} {row_mask.dtype}")
    check_choice("group_dims", group_dims, ("leading", "flatten"))


def check_choice(name: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
