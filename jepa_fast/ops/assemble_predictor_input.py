"""Context rows and mask tokens with their positions, packed for the predictor in one pass."""

import torch
from torch import Tensor

from ..reference import assemble_predictor_input as reference
from ._backends import compiled, cuda, triton
from ._define import define
from .gather_tokens import _check_range


def _native(raw, context, mask_token, index, positions, position_index):
    out = mask_token.new_empty(len(index), len(mask_token))
    rows = torch.cat([context.to(mask_token.dtype), mask_token.unsqueeze(0)])
    raw.gather_tokens(rows.unsqueeze(0), index.unsqueeze(0).contiguous(), positions.contiguous(),
                      position_index.unsqueeze(0).contiguous(), out.unsqueeze(0))
    return out


def _cuda(raw, context, mask_token, index, positions, position_index):
    out = mask_token.new_empty(len(index), len(mask_token))
    raw.assemble_predictor_input(*(t.contiguous() for t in (context, mask_token, index, positions, position_index)), out)
    return out


def _backward_native(raw, grad, index, num_context, context_dtype):
    rows = grad.new_empty(num_context + 1, grad.shape[1])
    raw.scatter_tokens(grad.unsqueeze(0).contiguous(), index.unsqueeze(0).contiguous(), None, None, rows.unsqueeze(0))
    return rows[:-1].to(context_dtype, copy=True), rows[-1].clone()


def _backward_cuda(raw, grad, index, num_context, context_dtype):
    grad_context = grad.new_empty(num_context, grad.shape[1], dtype=context_dtype)
    grad_mask_token = grad.new_empty(grad.shape[1], dtype=torch.float32)
    raw.assemble_predictor_input_backward(grad.contiguous(), index.contiguous(), grad_context, grad_mask_token)
    return grad_context, grad_mask_token.to(grad.dtype)


def _why_not_float64(language):
    return lambda *args: f"no {language} version for float64" if args[-1] is torch.float64 else None


def _check_values(context, mask_token, index, positions, position_index):
    _check_range("index", index, len(context) + 1)
    _check_range("position_index", position_index, len(positions))


define("assemble_predictor_input(Tensor context, Tensor mask_token, Tensor index, Tensor positions, Tensor position_index)"
       " -> Tensor",
       plain=reference.assemble_predictor_input,
       cpp=compiled("gather_tokens", (torch.float32, torch.bfloat16, torch.float64), _native),
       triton=triton("assemble_predictor_input"), cuda=cuda("assemble_predictor_input", call=_cuda), check=_check_values)
define("assemble_predictor_input_backward(Tensor grad, Tensor index, SymInt num_context, ScalarType context_dtype)"
       " -> (Tensor grad_context, Tensor grad_mask_token)",
       plain=reference.assemble_predictor_input_backward,
       cpp=compiled("scatter_tokens", (torch.float32, torch.bfloat16, torch.float64), _backward_native),
       triton=triton("assemble_predictor_input.assemble_predictor_input_backward", supports=_why_not_float64("Triton")),
       cuda=cuda("assemble_predictor_input_backward", call=_backward_cuda, supports=_why_not_float64("CUDA")))


@torch.library.register_fake("jepa_fast::assemble_predictor_input")
def _(context, mask_token, index, positions, position_index):
    return mask_token.new_empty(index.shape[0], mask_token.shape[0])


@torch.library.register_fake("jepa_fast::assemble_predictor_input_backward")
def _(grad, index, num_context, context_dtype):
    return grad.new_empty(num_context, grad.shape[1], dtype=context_dtype), grad.new_empty(grad.shape[1])


def _save(ctx, inputs, output):
    context, _, index, positions, position_index = inputs
    ctx.save_for_backward(index, position_index)
    ctx.num_context, ctx.context_dtype, ctx.num_positions = context.shape[0], context.dtype, positions.shape[0]


def _backward(ctx, grad):
    index, position_index = ctx.saved_tensors
    grad_context = grad_mask_token = grad_positions = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        grad_context, grad_mask_token = torch.ops.jepa_fast.assemble_predictor_input_backward(
            grad, index, ctx.num_context, ctx.context_dtype)
    if ctx.needs_input_grad[3]:
        rows = grad.unsqueeze(0), position_index.unsqueeze(0)
        grad_positions = torch.ops.jepa_fast.scatter_tokens(*rows, ctx.num_positions, None, None)[0]
    return grad_context, grad_mask_token, None, grad_positions, None


torch.library.register_autograd("jepa_fast::assemble_predictor_input", _backward, setup_context=_save)


def assemble_predictor_input(context: Tensor, mask_token: Tensor, index: Tensor, positions: Tensor,
                             position_index: Tensor) -> Tensor:
    """Rows of `context` by number, the mask token where the number is R, each with its position added.

    context [R, D]; mask_token [D]; index [P] int64 in [0, R]; positions [L, D] in mask_token's dtype; position_index [P]
    int64 -> [P, D] in mask_token's dtype, to which context is widened: a float32 residual stream under autocast. Indices
    may repeat; gradients add up. Raises IndexError for an index out of range (CPU; undefined on a GPU).
    I-JEPA, arXiv:2301.08243, section 3.
    """
    if not context.is_floating_point() or not mask_token.is_floating_point():
        raise TypeError(f"context and mask_token must be floating point, got {context.dtype} and {mask_token.dtype}")
    if context.dim() != 2 or mask_token.shape != context.shape[1:]:
        raise ValueError(f"context must be [R, D] and mask_token [D], "
                         f"got {list(context.shape)} and {list(mask_token.shape)}")
    if positions.dim() != 2 or positions.shape[1:] != mask_token.shape or positions.dtype != mask_token.dtype:
        raise ValueError(f"positions must be [L, D] with D = {len(mask_token)} {mask_token.dtype} as mask_token, "
                         f"got {list(positions.shape)} {positions.dtype}")
    for name, numbers in (("index", index), ("position_index", position_index)):
        if numbers.dtype != torch.int64 or numbers.dim() != 1 or numbers.shape != index.shape:
            raise ValueError(f"index and position_index must be [P] int64, got {name} {list(numbers.shape)} {numbers.dtype}")
    devices = {t.device for t in (context, mask_token, index, positions, position_index)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
    return torch.ops.jepa_fast.assemble_predictor_input(context, mask_token, index, positions, position_index)
