"""What the predictor sees: context rows and mask tokens in one packed batch, at their places in the grid.

    out[p] = context[index[p]] + positions[position_index[p]],   the mask token being the row after the last of context

I-JEPA, arXiv:2301.08243, section 3: the predictor takes the context of a sample and one mask token for every token of a
target block, once per block, so every context row is written several times.
"""

import torch
from torch import Tensor

from .gather_tokens import gather_tokens, scatter_tokens


def assemble_predictor_input(context: Tensor, mask_token: Tensor, index: Tensor, positions: Tensor,
                             position_index: Tensor) -> Tensor:
    """context [R, D], mask_token [D], index [P], positions [L, D], position_index [P] -> [P, D] in mask_token's dtype."""
    rows = torch.cat([context.to(mask_token.dtype), mask_token.unsqueeze(0)]).unsqueeze(0)
    return gather_tokens(rows, index.unsqueeze(0), positions, position_index.unsqueeze(0))[0]


def assemble_predictor_input_backward(grad: Tensor, index: Tensor, num_context: int,
                                      context_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """grad [P, D], index [P] -> its rows summed by number: for context [R, D] in context_dtype, for the mask token [D]."""
    rows = scatter_tokens(grad.unsqueeze(0), index.unsqueeze(0), num_context + 1, None, None)[0]
    return rows[:-1].to(context_dtype, copy=True), rows[-1].clone()
