"""SIGReg: how far embeddings are from a standard normal along random directions, without the [N, K, J] tensor."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference import sigreg as reference
from ..reference.quadrature import Quadrature
from ._define import compiled, define
from ._distributed import resolve_group, sum_over_ranks
from .directions import directions as draw_directions

PIECE = 1 << 19  # projections held at a time: 2 MB, which stay in the cache from one pass to the next
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _sums_cpp(x, directions, row_mask, t_start, t_step, num_knots):
    sums = x.new_zeros(x.shape[0], 2, num_knots, directions.shape[1], dtype=torch.float64)
    for p, mask, groups, _, columns in _projections(x.float(), directions.float().contiguous(), row_mask):
        torch.ops.jepa_fast_C.sigreg_add_sums(p, mask, t_start, t_step, sums[groups, :, :, columns])
    return sums.float()


def _sums_backward_cpp(grad_sums, x, directions, row_mask, t_start, t_step):
    grad_sums, directions = grad_sums.contiguous(), directions.float().contiguous()
    grad_x = torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    flat = grad_x.view(-1, x.shape[2])
    for p, mask, groups, rows, columns in _projections(x.float(), directions, row_mask):
        torch.ops.jepa_fast_C.sigreg_gradient_(p, mask, grad_sums[groups, :, :, columns], t_start, t_step)
        flat[rows].addmm_(p.view(-1, p.shape[2]), directions[:, columns].T)
    return grad_x.to(x.dtype)


def _projections(x: Tensor, directions: Tensor, row_mask: Tensor | None) -> Iterator[tuple]:
    """x @ directions piece by piece, in memory that is used again: p [groups, rows, columns], its mask, where it lies."""
    V, N, D = x.shape
    x = x.detach().reshape(V * N, D).contiguous()
    mask = None if row_mask is None else row_mask.reshape(-1)
    room = x.new_empty(min(PIECE, V * N * directions.shape[1]))
    for groups, rows, columns in _pieces(V, N, directions.shape[1]):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        p = torch.mm(x[rows], directions[:, columns], out=room[:height * width].view(height, width))
        shape = (groups.stop - groups.start, -1)
        yield p.view(*shape, width), None if mask is None else mask[rows].view(shape), groups, rows, columns


def _pieces(V: int, N: int, K: int) -> Iterator[tuple[slice, slice, slice]]:
    """(groups, rows over V * N, columns): whole groups together, or parts of one; the same for any number of threads."""
    width = min(K, max(256, PIECE // max(V * N, 1) // 16 * 16))
    height = PIECE // width // 64 * 64  # a multiple of the rows that are added up in float32
    for k in range(0, K, width):
        columns = slice(k, min(k + width, K))
        if N > height:
            for v in range(V):
                for n in range(0, N, height):
                    yield slice(v, v + 1), slice(v * N + n, v * N + min(n + height, N)), columns
        elif N > 0:
            for v in range(0, V, height // N):
                end = min(v + height // N, V)
                yield slice(v, end), slice(v * N, end * N), columns


def _statistic_cpp(sums, count, phi, weights):
    out = sums.new_empty(sums.shape[0], sums.shape[3])
    knots = torch.tensor([phi, weights], dtype=torch.float64)
    torch.ops.jepa_fast_C.sigreg_statistic(sums.contiguous(), count.contiguous(), knots, out)
    return out


def _statistic_backward_cpp(grad, sums, count, phi, weights):
    out = torch.empty_like(sums, memory_format=torch.contiguous_format)
    knots = torch.tensor([phi, weights], dtype=torch.float64)
    torch.ops.jepa_fast_C.sigreg_statistic_backward(grad.contiguous(), sums.contiguous(), count.contiguous(), knots, out)
    return out


define("sigreg_sums(Tensor x, Tensor directions, Tensor? row_mask, float t_start, float t_step, SymInt num_knots) "
       "-> Tensor",
       plain=reference.sigreg_sums, cpp=compiled("sigreg_sums", _FLOATS, _sums_cpp))
define("sigreg_sums_backward(Tensor grad_sums, Tensor x, Tensor directions, Tensor? row_mask, float t_start, float t_step) "
       "-> Tensor",
       plain=reference.sigreg_sums_backward, cpp=compiled("sigreg_sums_backward", _FLOATS, _sums_backward_cpp))
define("sigreg_statistic(Tensor sums, Tensor count, float[] phi, float[] weights) -> Tensor",
       plain=reference.sigreg_statistic, cpp=compiled("sigreg_statistic", (torch.float32,), _statistic_cpp))
define("sigreg_statistic_backward(Tensor grad, Tensor sums, Tensor count, float[] phi, float[] weights) -> Tensor",
       plain=reference.sigreg_statistic_backward,
       cpp=compiled("sigreg_statistic_backward", (torch.float32,), _statistic_backward_cpp))


@torch.library.register_fake("jepa_fast::sigreg_sums")
def _(x, directions, row_mask, t_start, t_step, num_knots):
    return x.new_empty(x.shape[0], 2, num_knots, directions.shape[1], dtype=reference.accumulation_dtype(x))


@torch.library.register_fake("jepa_fast::sigreg_sums_backward")
def _(grad_sums, x, directions, row_mask, t_start, t_step):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


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
    return torch.ops.jepa_fast.sigreg_sums_backward(grad, *ctx.saved_tensors, *ctx.grid), None, None, None, None, None


def _save_statistic(ctx, inputs, output):
    sums, count, ctx.phi, ctx.weights = inputs
    ctx.save_for_backward(sums, count)


def _statistic_backward(ctx, grad):
    grad_sums = torch.ops.jepa_fast.sigreg_statistic_backward(grad, *ctx.saved_tensors, ctx.phi, ctx.weights)
    return grad_sums, None, None, None


torch.library.register_autograd("jepa_fast::sigreg_sums", _sums_backward, setup_context=_save_sums)
torch.library.register_autograd("jepa_fast::sigreg_statistic", _statistic_backward, setup_context=_save_statistic)


def sigreg(x: Tensor, directions: Tensor | None = None, *, quadrature: Quadrature = Quadrature.half_line(3.0, 17),
           num_slices: int = 1024, seed: int = 0, step: int | Tensor | None = None, rng: str = "philox",
           row_mask: Tensor | None = None, group_dims: str = "leading", scale: str | float = "N_global",
           reduction: str | None = "mean", clip: float | None = None, process_group=None,
           ddp_weighting: str = "sample", upstream_sync: bool = False) -> Tensor:
    """SIGReg of embeddings x [..., N, D]; float32 (float64 for float64 x), also for half precision and under autocast.

    directions [D, K]: used as they are, no gradient; else `num_slices` are drawn from (seed, step), see `directions`.
    row_mask [..., N] bool: rows that count; the others get no gradient and may hold anything, NaN included.
    group_dims: "leading": each of the leading dims (views, time steps) is a group of its own; "flatten": all rows are one.
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
    lead = () if group_dims == "flatten" else tuple(x.shape[:-2])
    x, row_mask = _grouped(x, row_mask, lead)
    sums = torch.ops.jepa_fast.sigreg_sums(x, directions.to(reference.accumulation_dtype(x)), row_mask,
                                           quadrature.t_start, quadrature.t_step, quadrature.num_knots)
    rows = _rows(x, row_mask, sums)
    rows_global = count = rows
    if group is not None:
        sums, count, rows_global = _over_ranks(sums, rows, group, ddp_weighting, upstream_sync)
    statistic = torch.ops.jepa_fast.sigreg_statistic(sums, count, quadrature.phi, quadrature.weights)
    if scale != "none":
        factors = {"N": rows, "N_global": rows_global}
        statistic = statistic * (factors[scale].unsqueeze(-1) if scale in factors else scale)
    if clip is not None:
        statistic = torch.where(statistic < clip, 0, statistic)
    if reduction is None:
        return statistic.reshape(*lead, statistic.shape[-1])
    return statistic.mean() if reduction == "mean" else statistic.sum()


def _grouped(x: Tensor, row_mask: Tensor | None, lead: tuple) -> tuple[Tensor, Tensor | None]:
    """[V, N, D] and [V, N], V = 1 without leading dims."""
    V = math.prod(lead)
    N = x.shape[-2] if lead else math.prod(x.shape[:-1])
    return x.reshape(V, N, x.shape[-1]), None if row_mask is None else row_mask.reshape(V, N)


def _rows(x: Tensor, row_mask: Tensor | None, sums: Tensor) -> Tensor:
    """Rows of each group, [V] in the dtype of the sums: exact up to 2^24."""
    if row_mask is None:
        return sums.new_full((x.shape[0],), x.shape[1])
    return row_mask.sum(1).to(sums.dtype)


def _over_ranks(sums: Tensor, rows: Tensor, group, weighting: str, upstream_sync: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sums and what to divide them by, over all ranks, and the rows of all ranks; one all-reduce."""
    has_rows = (rows > 0).to(rows.dtype)
    if weighting == "rank":  # means of the ranks, each with weight 1
        sums = sums / torch.where(rows > 0, rows, 1)[:, None, None, None]
    packed = sum_over_ranks(torch.cat([sums.flatten(), rows, has_rows]), group, upstream_sync)
    total, rows, ranks = packed.split([sums.numel(), rows.numel(), rows.numel()])
    rows = rows.detach()
    return total.view(sums.shape), ranks.detach() if weighting == "rank" else rows, rows


def _check(x, directions, row_mask, group_dims, scale, reduction, ddp_weighting) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [..., N, D], got {list(x.shape)} {x.dtype}")
    if directions is not None:
        if directions.dim() != 2 or directions.shape[0] != x.shape[-1] or not directions.is_floating_point():
            raise ValueError(f"directions must be floating point [D, K] with D = {x.shape[-1]}, "
                             f"got {list(directions.shape)} {directions.dtype}")
        if directions.requires_grad:
            raise ValueError("directions are constants here and must not require a gradient; detach them")
        if directions.device != x.device:
            raise ValueError(f"directions must be on the device of x, {x.device}, got {directions.device}")
    if row_mask is not None and (row_mask.shape != x.shape[:-1] or row_mask.dtype != torch.bool):
        raise ValueError(f"row_mask must be {list(x.shape[:-1])} bool, got {list(row_mask.shape)} {row_mask.dtype}")
    for name, value, allowed in (("group_dims", group_dims, ("leading", "flatten")),
                                 ("reduction", reduction, ("mean", "sum", None)),
                                 ("ddp_weighting", ddp_weighting, ("rank", "sample"))):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    if isinstance(scale, str) and scale not in ("N", "N_global", "none"):
        raise ValueError(f"scale must be N, N_global, none or a number, got {scale!r}")
