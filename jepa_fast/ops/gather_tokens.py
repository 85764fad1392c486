"""Rows by index with positions added (`gather_tokens`) and rows put back (`scatter_tokens`), each the other's backward."""

import torch
from torch import Tensor

from ..reference import gather_tokens as reference
from ._backends import compiled, cuda, triton
from ._define import define

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def _check_range(what: str, index: Tensor, size: int) -> None:
    if index.device.type != "cpu":
        torch._assert_async(((index >= 0) & (index < size)).all(), f"{what} must be in [0, {size})")
    elif index.numel():
        low, high = (int(value) for value in torch.aminmax(index))
        if low < 0 or high >= size:
            raise IndexError(f"{what} must be in [0, {size}), got {low if low < 0 else high}")


def _check_gather(x, index, positions, position_index):
    _check_range("index", index, x.shape[1])
    if position_index is not None:
        _check_range("position_index", position_index, positions.shape[0])


def _gather_native(raw, x, index, positions, position_index):
    out = x.new_empty(x.shape[0], index.shape[1], x.shape[2])
    arguments = [None if t is None else t.contiguous() for t in (x, index, positions, position_index)]
    raw.gather_tokens(*arguments, out)
    return out


def _scatter_native(raw, values, index, num_tokens, fill, positions):
    out = values.new_empty(values.shape[0], num_tokens, values.shape[2])
    arguments = [None if t is None else t.contiguous() for t in (values, index, fill, positions)]
    raw.scatter_tokens(*arguments, out)
    return out


define("gather_tokens(Tensor x, Tensor index, Tensor? positions, Tensor? position_index) -> Tensor",
       plain=reference.gather_tokens, cpp=compiled("gather_tokens", _DTYPES, _gather_native),
       cuda=cuda("gather_tokens", call=_gather_native), triton=triton("gather_tokens"), check=_check_gather)
define("scatter_tokens(Tensor values, Tensor index, SymInt num_tokens, Tensor? fill, Tensor? positions) -> Tensor",
       plain=reference.scatter_tokens, cpp=compiled("scatter_tokens", _DTYPES, _scatter_native),
       triton=triton("gather_tokens.scatter_tokens"),
       cuda=cuda("scatter_tokens", call=_scatter_native),
       check=lambda values, index, num_tokens, fill, positions: _check_range("index", index, num_tokens))


@torch.library.register_fake("jepa_fast::gather_tokens")
def _(x, index, positions, position_index):
    return x.new_empty(x.shape[0], index.shape[1], x.shape[2])


@torch.library.register_fake("jepa_fast::scatter_tokens")
def _(values, index, num_tokens, fill, positions):
    return values.new_empty(values.shape[0], num_tokens, values.shape[2])


def _save_gather(ctx, inputs, output):
    x, index, positions, position_index = inputs
    ctx.save_for_backward(index, position_index)
    ctx.num_tokens = x.shape[1]
    ctx.num_positions = None if positions is None else positions.shape[0]


def _gather_backward(ctx, grad):
    index, position_index = ctx.saved_tensors
    grad_x = grad_positions = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.jepa_fast.scatter_tokens(grad, index, ctx.num_tokens, None, None)
    if ctx.num_positions is not None and ctx.needs_input_grad[2]:
        rows = index % ctx.num_positions if position_index is None else position_index
        flat = grad.reshape(1, -1, grad.shape[-1])
        grad_positions = torch.ops.jepa_fast.scatter_tokens(flat, rows.reshape(1, -1), ctx.num_positions, None, None)[0]
    return grad_x, None, grad_positions, None


def _save_scatter(ctx, inputs, output):
    _, index, ctx.num_tokens, fill, positions = inputs
    ctx.save_for_backward(index)
    ctx.num_positions = None if positions is None else positions.shape[0]
    ctx.has_fill = fill is not None


def _scatter_backward(ctx, grad):
    (index,) = ctx.saved_tensors
    grad_values = grad_fill = grad_positions = None
    if ctx.needs_input_grad[0]:
        grad_values = torch.ops.jepa_fast.gather_tokens(grad, index, None, None)
    if ctx.has_fill and ctx.needs_input_grad[3]:
        unwritten = ~reference.is_written(index, ctx.num_tokens)
        grad_fill = torch.where(unwritten.unsqueeze(-1), grad, grad.new_zeros(())).sum((0, 1))
    if ctx.num_positions is not None and ctx.needs_input_grad[4]:
        grad_positions = grad.reshape(-1, ctx.num_positions, grad.shape[-1]).sum(0)
    return grad_values, None, None, grad_fill, grad_positions


torch.library.register_autograd("jepa_fast::gather_tokens", _gather_backward, setup_context=_save_gather)
torch.library.register_autograd("jepa_fast::scatter_tokens", _scatter_backward, setup_context=_save_scatter)


def gather_tokens(x: Tensor, index: Tensor, positions: Tensor | None = None,
                  position_index: Tensor | None = None) -> Tensor:
    """Rows of `x` by number, with a position row added to each where `positions` is given.

    x [B, N, D] with index [B, K] int64 -> [B, K, D], or packed: x [R, D] with index [P] int64 -> [P, D].
    positions [L, D]: row p gets `positions[position_index[p]]`; without `position_index` (shape of `index`) it is
    `index % L`, the token number when x packs samples of L tokens. Indices may repeat; gradients to x add up.
    Raises IndexError for an index out of range (CPU; undefined on a GPU).
    """
    _check("x", x, index)
    if positions is not None:
        _check_row("positions", positions, x, 2)
    if position_index is not None:
        if positions is None:
            raise ValueError("position_index was given without positions")
        if position_index.shape != index.shape or position_index.dtype != torch.int64:
            raise ValueError(f"position_index must be {list(index.shape)} int64 as index, "
                             f"got {list(position_index.shape)} {position_index.dtype}")
    if index.dim() == 2:
        return torch.ops.jepa_fast.gather_tokens(x, index, positions, position_index)
    rows = None if position_index is None else position_index.unsqueeze(0)
    return torch.ops.jepa_fast.gather_tokens(x.unsqueeze(0), index.unsqueeze(0), positions, rows)[0]


def scatter_tokens(values: Tensor, index: Tensor, num_tokens: int, fill: Tensor | None = None,
                   positions: Tensor | None = None) -> Tensor:
    """Put rows back at their numbers; rows named more than once are summed.

    values [B, K, D] with index [B, K] int64 -> [B, num_tokens, D], or packed [P, D], [P] -> [num_tokens, D].
    Rows that no index names are `fill` [D] (a mask token), else zero. positions [L, D] is added to every row, repeated
    over the packed samples; L divides num_tokens. Raises IndexError for an index out of range (CPU).
    """
    _check("values", values, index)
    if index.shape[-1] != values.shape[-2]:
        raise ValueError(f"index must name each of the {values.shape[-2]} rows of values, got {index.shape[-1]}")
    if fill is not None:
        _check_row("fill", fill, values, 1)
    if positions is not None:
        _check_row("positions", positions, values, 2)
        if num_tokens % positions.shape[0]:
            raise ValueError(f"num_tokens must be a multiple of the {positions.shape[0]} positions, got {num_tokens}")
    if index.dim() == 2:
        return torch.ops.jepa_fast.scatter_tokens(values, index, num_tokens, fill, positions)
    out = torch.ops.jepa_fast.scatter_tokens(values.unsqueeze(0), index.unsqueeze(0), num_tokens, fill, positions)
    return out[0]


def _check(name: str, x: Tensor, index: Tensor) -> None:
    if index.dtype != torch.int64 or index.dim() not in (1, 2):
        raise ValueError(f"index must be [B, K] or [P] int64, got {list(index.shape)} {index.dtype}")
    if x.dim() != index.dim() + 1 or (index.dim() == 2 and x.shape[0] != index.shape[0]):
        raise ValueError(f"{name} must be [B, N, D] for index [B, K], or [R, D] for index [P]; "
                         f"got {name} {list(x.shape)} with index {list(index.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.device != index.device:
        raise ValueError(f"{name} and index must be on one device, got {x.device} and {index.device}")


def _check_row(name: str, row: Tensor, x: Tensor, dims: int) -> None:
    if row.dim() != dims or row.shape[-1] != x.shape[-1] or row.dtype != x.dtype:
        expected = "[D]" if dims == 1 else "[L, D]"
        raise ValueError(f"{name} must be {expected} with D = {x.shape[-1]} {x.dtype}, "
                         f"got {list(row.shape)} {row.dtype}")
