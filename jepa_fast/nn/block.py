"""The transformer block of every JEPA here, on packed tokens [P, D] with cu_seqlens."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..ops import bias_gelu, gather_tokens, varlen_attention, varlen_attention_qkv
from .block_compiled import Fusion, compiled_block, fastest
from .block_function import Activations, BlockWeights, How, block
from .fp8 import Float8Weight
from .linear import linear


@dataclass(frozen=True)
class Sequences:
    """Where sequences begin and end among packed tokens [P, D], and how their tokens attend to each other."""

    cu_seqlens: Tensor              # [S + 1] int32
    max_seqlen: int
    rotary: Tensor | None = None    # [P, 2, R] float32 from `rotary_table`: turns queries and keys of every block
    frame_size: int = 0             # F > 0: tokens attend to their own frame of F tokens and to earlier ones

    @staticmethod
    def uniform(num_sequences: int, length: int, device: torch.device, rotary: Tensor | None = None,
                frame_size: int = 0) -> "Sequences":
        """S sequences of one length; `rotary` of the S * length tokens."""
        ends = torch.arange(0, (num_sequences + 1) * length, max(length, 1), dtype=torch.int32, device=device)
        return Sequences(ends[: num_sequences + 1], length, rotary, frame_size)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions widened; float32 and float64 as they are. Losses are computed in this."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Attention(nn.Module):
    """Self-attention within each packed sequence; one Linear makes queries, keys and values, in this order."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        return self._attend(x, sequences)[0]

    def _attend(self, x: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """forward(x), and qkv [P, 3, H, d]."""
        P, D = x.shape
        qkv = linear(x, self.qkv.weight, self.qkv.bias).view(P, 3, self.num_heads, D // self.num_heads)
        out = varlen_attention_qkv(qkv, sequences.cu_seqlens, sequences.max_seqlen, rotary=sequences.rotary,
                                   frame_size=sequences.frame_size)
        return self._project(out.view(P, D)), qkv

    def of_rows(self, x: Tensor, sequences: Sequences, rows: Tensor, row_sequences: Sequences) -> Tensor:
        """Rows `rows` [Q] of forward(x): only they are queries; every row of x [P, D] is a key and a value."""
        if sequences.frame_size:
            raise ValueError("of_rows is for full attention, got frame-causal sequences")
        P, D = x.shape
        rotary = sequences.rotary
        heads = (self.num_heads, D // self.num_heads)
        q = linear(gather_tokens(x, rows), self.qkv.weight[:D], self.qkv.bias[:D])
        k, v = linear(x, self.qkv.weight[D:], self.qkv.bias[D:]).view(P, 2, *heads).unbind(1)
        out = varlen_attention(q.view(-1, *heads), k, v, row_sequences.cu_seqlens, row_sequences.max_seqlen,
                               sequences.cu_seqlens, sequences.max_seqlen, rotary_k=rotary,
                               rotary_q=None if rotary is None else rotary[rows])
        return self._project(out.view(-1, D))

    def forward_and_keep(self, x: Tensor, sequences: Sequences, num_kept: int) -> tuple[Tensor, Tensor]:
        """forward(x) of B sequences of one length; keys and values [B, num_kept, 2, H, d] of their first tokens."""
        out, qkv = self._attend(x, sequences)
        return out, qkv.unflatten(0, (-1, sequences.max_seqlen))[:, :num_kept, 1:]

    def extend(self, x: Tensor, kept: Tensor | None, new: Sequences, whole: Sequences) -> tuple[Tensor, Tensor]:
        """forward at the last rows x [B * Q, D] of B sequences of L + Q tokens, and their keys and values.

        kept [B, L, 2, H, d] is of the rows before, or None, and returned as [B, L + Q, 2, H, d]; rotary positions are not
        in it. `new` holds the rows of x, `whole` all. Exact where earlier rows do not see later ones: for whole frames.
        """
        Q, D = new.max_seqlen, x.shape[1]
        qkv = linear(x, self.qkv.weight, self.qkv.bias).view(-1, Q, 3, self.num_heads, D // self.num_heads)
        kept = qkv[:, :, 1:] if kept is None else torch.cat([kept, qkv[:, :, 1:]], 1)
        k, v = kept.flatten(0, 1).unbind(1)
        # the tokens of one frame, the last, see everything
        frame_size = 0 if Q <= whole.frame_size else whole.frame_size
        out = varlen_attention(qkv[:, :, 0].flatten(0, 1), k, v, new.cu_seqlens, Q, whole.cu_seqlens, whole.max_seqlen,
                               rotary_q=new.rotary, rotary_k=whole.rotary, frame_size=frame_size)
        return self._project(out.view(-1, D)), kept

    def _project(self, out: Tensor) -> Tensor:
        return linear(out, self.proj.weight, self.proj.bias)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return linear(bias_gelu(linear(x, self.fc1.weight), self.fc1.bias), self.fc2.weight, self.fc2.bias)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm1(x)), then x + mlp(norm2(x)).

    `drop_path` is the probability that a sequence skips a branch in training (stochastic depth); the kept ones are
    scaled up by 1 / (1 - drop_path). `activations` says what the backward pass finds and what it computes again, `fusion`
    who fuses: see block_function and block_compiled.
    """

    activations: Activations = "all"
    fusion: Fusion = "ops"
    copies: dict[nn.Parameter, Tensor] | None = None  # of weights in a narrower dtype, kept up to date by the optimizer
    float8: dict[nn.Parameter, Float8Weight] | None = None  # of weights where nothing trains, see fp8

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        scale1, scale2 = (self._row_scale(sequences, x.shape[0]) for _ in range(2))
        how = How(sequences.cu_seqlens, sequences.max_seqlen, sequences.rotary, sequences.frame_size, self.attn.num_heads,
                  self.norm1.eps, dtype, self.activations, scale1, scale2)
        weights = BlockWeights(*(parameter for layer in (self.norm1, self.attn.qkv, self.attn.proj, self.norm2,
                                                         self.mlp.fc1, self.mlp.fc2)
                                 for parameter in (layer.weight, layer.bias)))
        compute = compiled_block if self.fusion == "compile" and self.float8 is None else block
        return compute(x, weights, self._in(dtype, weights), how)

    def _in(self, dtype: torch.dtype, weights: BlockWeights) -> BlockWeights:
        """The weights of products in the dtype that these compute in: the optimizer's copies, or made here."""
        def narrowed(weight: Tensor) -> Tensor | Float8Weight:
            if self.float8 is not None and weight in self.float8:
                return self.float8[weight]
            if weight.dtype == dtype:
                return weight
            copy = None if self.copies is None else self.copies.get(weight)
            return copy if copy is not None and copy.dtype == dtype else weight.detach().to(dtype)

        names = ("qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "fc1_weight", "fc2_weight", "fc2_bias")
        return weights._replace(**{name: narrowed(getattr(weights, name)) for name in names})

    def of_rows(self, x: Tensor, sequences: Sequences, rows: Tensor, row_sequences: Sequences) -> Tensor:
        """Rows `rows` [Q] of forward(x) -> [Q, D], where the others are not wanted: exact, without their share of work."""
        attended = self.attn.of_rows(self.norm1(x), sequences, rows, row_sequences)
        x = gather_tokens(x, rows) + self._drop(attended, row_sequences)
        return x + self._drop(self.mlp(self.norm2(x)), row_sequences)

    def forward_and_keep(self, x: Tensor, sequences: Sequences, num_kept: int) -> tuple[Tensor, Tensor]:
        """forward(x), and the keys and values that `extend` needs of the first tokens of each sequence."""
        attended, kept = self.attn.forward_and_keep(self.norm1(x), sequences, num_kept)
        x = x + self._drop(attended, sequences)
        return x + self._drop(self.mlp(self.norm2(x)), sequences), kept

    def extend(self, x: Tensor, kept: Tensor | None, new: Sequences, whole: Sequences) -> tuple[Tensor, Tensor]:
        """forward at rows x added to the end of sequences whose keys and values are kept; see `Attention.extend`."""
        attended, kept = self.attn.extend(self.norm1(x), kept, new, whole)
        x = x + self._drop(attended, new)
        return x + self._drop(self.mlp(self.norm2(x)), new), kept

    def _drop(self, branch: Tensor, sequences: Sequences) -> Tensor:
        scale = self._row_scale(sequences, branch.shape[0])
        return branch if scale is None else branch * scale.to(branch.dtype)

    def _row_scale(self, sequences: Sequences, num_rows: int) -> Tensor | None:
        """Stochastic depth of one branch [P, 1]: 0 for the rows of sequences that skip it; None where none does."""
        if not self.training or self.drop_path == 0.0:
            return None
        lengths = sequences.cu_seqlens.diff()
        keep = torch.rand(len(lengths), device=lengths.device) >= self.drop_path
        return torch.repeat_interleave(keep / (1 - self.drop_path), lengths, output_size=num_rows).unsqueeze(1)


def use_copies_(module: nn.Module, copies: dict[nn.Parameter, Tensor]) -> None:
    """Let every block of a module take these copies of its weights where products are computed in their dtype."""
    for part in module.modules():
        if isinstance(part, Block):
            part.copies = {parameter: copies[parameter] for parameter in part.parameters() if parameter in copies}


def configure_blocks_(module: nn.Module, activations: Activations, fusion: Fusion | Literal["auto"],
                      architecture: str) -> None:
    """What every block of a module keeps for its backward pass, and who fuses; auto: what was measured as faster there."""
    for part in module.modules():
        if isinstance(part, Block):
            part.activations, part.fusion = activations, fusion
            if fusion == "auto":
                part.fusion = fastest(architecture, part.norm1.weight.shape[0]) if activations == "all" else "ops"
