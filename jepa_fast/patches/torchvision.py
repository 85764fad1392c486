"""torchvision: encoder blocks of its VisionTransformer, which lightly's torchvision ViTs are made of, as one node each."""

from importlib import import_module

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ._block import BlockParts, gains, is_transformed, run_block, why_never, why_not_now
from ._report import Report, check_signature

_MODULE, _BLOCK = "torchvision.models.vision_transformer", "EncoderBlock"


def matches(model: nn.Module) -> bool:
    """Whether a model has encoder blocks of torchvision."""
    return any(_is_block(part) for part in model.modules())


def apply(model: nn.Module | None = None, *, strict_numerics: bool = False) -> Report:
    """Replace torchvision.models.vision_transformer.EncoderBlock.forward; strict_numerics changes nothing."""
    block = getattr(import_module(_MODULE), _BLOCK)
    check_signature(block.forward, lambda self, input: 0, "torchvision's EncoderBlock.forward")
    with Report.of("torchvision") as report:
        report.replace_method(block, "forward", fast_block, model)
        for part in () if model is None else model.modules():
            why = _is_block(part) and (parts if isinstance(parts := block_parts(part), str) else why_never(parts))
            if why:
                report.keep("EncoderBlock as a whole", why)
        report.note("torchvision's code runs under torch.compile, torch.export, torch.fx and torch.jit, where parts have "
                    "hooks or drop, and on CPUs for few tokens, where it is faster; GPUs: not measured")
        report.note("a fused block has no second derivative: undo() before create_graph=True")
    return report


def fast_block(original, self, input):
    if not is_transformed(input) and gains(input):
        parts = block_parts(self)
        if not isinstance(parts, str) and why_not_now(self, parts, input) is None:
            return run_block(input, parts)
    return original(self, input)


def block_parts(block: nn.Module) -> BlockParts | str:
    """What an EncoderBlock computes with, or what it does that ours does not."""
    attn, mlp = block.self_attention, block.mlp
    if (type(attn) is not nn.MultiheadAttention or type(attn.in_proj_weight) is not nn.Parameter
            or attn.bias_k is not None):
        return f"its attention is a {type(attn).__name__} of another kind"
    if attn.add_zero_attn or not attn.batch_first or type(attn.out_proj) is not NonDynamicallyQuantizableLinear:
        return "its attention has options that ours does not"
    if attn.training and attn.dropout > 0:
        return "its attention drops"
    if [type(layer) for layer in mlp] != [nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.Dropout]:
        return f"its MLP is {', '.join(type(layer).__name__ for layer in mlp)}"
    fc1, act, drop1, fc2, drop2 = mlp

    def make_qkv() -> tuple[Tensor, Tensor]:
        bias = attn.in_proj_bias
        return attn.in_proj_weight, attn.in_proj_weight.new_zeros(3 * attn.embed_dim) if bias is None else bias

    return BlockParts(block.ln_1, (), attn.out_proj, block.ln_2, fc1, act, fc2, attn.num_heads,
                      dropouts=(block.dropout, drop1, drop2), make_qkv=make_qkv)


def _is_block(part: nn.Module) -> bool:
    return type(part).__module__ == _MODULE and type(part).__name__ == _BLOCK
