"""lightly: SIGReg, the token functions and the moving average of its models; its ViTs through those of timm and torchvision.

Written for lightly 1.6.
"""

import functools
import importlib.util
import types
from collections.abc import Iterable
from importlib import import_module

import torch
from torch import Tensor, nn

from ..drop_in.collators import _next_official
from ..masking import MultiBlock
from ..nn.sigreg_sources import LightlySIGReg
from ..ops import ema_update_, gather_tokens
from . import timm, torchvision
from ._block import is_transformed
from ._report import Report, check_signature, modules_of_package

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# on a CPU, less than this gains nothing: numbers moved, numbers of a moving average, projections of SIGReg
MIN_MOVED, MIN_AVERAGED, MIN_PROJECTIONS = 1 << 16, 1 << 18, 1 << 13


def matches(model: nn.Module) -> bool:
    """Whether a model has parts of lightly."""
    return any(type(part).__module__.startswith("lightly.") for part in model.modules())


def apply(model: nn.Module | None = None, *, modules: Iterable[types.ModuleType] = (),
          strict_numerics: bool = False) -> Report:
    """Replace SIGReg.forward and lightly.models.utils.{get,set,mask}_at_index, apply_masks and update_momentum.

    The functions are replaced in all of lightly and in `modules`, those of yours that imported them. SIGReg: of the class
    where model is None (then of LeJEPALoss and LeWMLoss too), else of the losses inside a model. Takes the patches of timm
    and torchvision with it, and where model is None IJEPAMaskCollator, whose masks stay the same bits. strict_numerics
    leaves mask_at_index alone, which multiplies by zero what it masks.
    """
    loss, utils, collate = map(import_module, ("lightly.loss.lejepa_loss", "lightly.models.utils",
                                               "lightly.data.ijepa_collate"))
    check_signature(loss.SIGReg.forward, lambda self, proj: 0, "lightly's SIGReg.forward")
    check_signature(loss.SIGReg._generate_unit_vectors, lambda self, device, dtype, num_features: 0,
                    "lightly's SIGReg._generate_unit_vectors")
    check_signature(collate.IJEPAMaskCollator.__call__, lambda self, batch: 0, "lightly's IJEPAMaskCollator.__call__")
    for name, (expected, _) in _FUNCTIONS.items():
        check_signature(getattr(utils, name), expected, f"lightly's {name}")
    with Report.of("lightly") as report:
        report.replace_method(loss.SIGReg, "forward", functools.partial(fast_sigreg, loss.SIGReg), model)
        if model is None:
            report.replace_method(collate.IJEPAMaskCollator, "__call__", fast_collator)
        else:
            report.keep("IJEPAMaskCollator", "no part of a model: apply() without one replaces it")
        for name, (_, fast) in _FUNCTIONS.items():
            original = getattr(utils, name)
            if strict_numerics and name == "mask_at_index":
                report.keep(name, "strict_numerics: a masked NaN stays NaN")
            elif not getattr(original, "is_of_jepa_fast", False):
                report.replace_everywhere(original, _instead_of(original, fast), [*modules_of_package("lightly"), *modules])
        for patch, package in ((timm, "timm"), (torchvision, "torchvision")):
            if patch.matches(model) if model is not None else importlib.util.find_spec(package) is not None:
                report.take(patch.apply(model))
        _say_what_differs(report, strict_numerics)
    return report


def _say_what_differs(report: Report, strict_numerics: bool) -> None:
    report.keep("VISRegLoss, CAPI and the other losses", "none of them is SIGReg")
    if not strict_numerics:
        report.note("mask_at_index replaces tokens that are NaN or infinite too; lightly's leaves NaN")
    report.note("SIGReg is float32 also under autocast and for half precision, where lightly rounds it")
    report.note("lightly's code runs under torch.compile, torch.fx and torch.jit, and for what ours does not take: integer "
                "tokens, averages in half precision")


def _instead_of(original, fast):
    @functools.wraps(original)
    def function(*args, **kwargs):
        return fast(original, *args, **kwargs)

    function.is_of_jepa_fast = True
    return function


def fast_sigreg(cls: type, original, self, proj: Tensor) -> Tensor:
    """LightlySIGReg.forward reads the attributes that lightly's has too, and draws by its `_generate_unit_vectors`."""
    is_plain = (type(self) is cls and not is_transformed(proj) and proj.dim() >= 2 and proj.dtype in _FLOATS
                and self.t.device == proj.device)
    if is_plain and _is_large(proj, proj.shape[:-1].numel() * self.num_vectors, MIN_PROJECTIONS):
        return LightlySIGReg.forward(self, proj)
    return original(self, proj)


def fast_collator(original, self, batch: list) -> tuple:
    """The collated batch, context lists and target lists; the same masks from the same random numbers, drawn in C++."""
    grid = self.height, self.width
    config = _blocks(grid, self.npred, self.nenc, tuple(self.pred_mask_scale), tuple(self.enc_mask_scale),
                     tuple(self.aspect_ratio), self.min_keep, self.allow_overlap)
    if config is None:
        return original(self, batch)
    collated, counter = torch.utils.data.default_collate(batch), self.step()
    masks = _next_official(config, grid, counter, len(batch))
    return collated, masks.context_lists(), masks.target_lists()


@functools.lru_cache(maxsize=64)
def _blocks(grid: tuple[int, int], *settings) -> MultiBlock | None:
    """A collator's settings; None for those with which lightly's may never end, which it may go on to try."""
    names = ("num_targets", "num_contexts", "target_scale", "context_scale", "aspect_ratio", "min_keep", "allow_overlap")
    try:
        config = MultiBlock(**dict(zip(names, settings, strict=True)))
        config.check_grid(grid)
    except (TypeError, ValueError):
        return None
    return config


def get_at_index(original, tokens: Tensor, index: Tensor) -> Tensor:
    return _select(tokens, index) if _is_plain(tokens, index) else original(tokens, index)


def apply_masks(original, x: Tensor, masks: Tensor | list[Tensor]) -> Tensor:
    """[B, N, D] and lists of [B, K] -> [M B, K, D], mask by mask."""
    indices = masks if isinstance(masks, list) else [masks]
    if not indices or not all(_is_plain(x, index) for index in indices):
        return original(x, masks)
    return torch.cat([_select(x, index) for index in indices]) if len(indices) > 1 else _select(x, indices[0])


def _select(tokens: Tensor, index: Tensor) -> Tensor:
    moved = index.numel() * tokens.shape[-1]
    if _is_large(tokens, moved, MIN_MOVED) and not (tokens.is_cpu and tokens.requires_grad and torch.is_grad_enabled()):
        return gather_tokens(tokens, index)
    return torch.gather(tokens, 1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))  # its backward is as fast on a CPU


def _is_large(x: Tensor, count: int, least: int) -> bool:
    return x.device.type != "cpu" or count >= least


def set_at_index(original, tokens: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """A row of a copy at a time; which of several rows for one index stays is open, there as here."""
    if not (_is_plain(tokens, index) and isinstance(value, Tensor) and value.dtype == tokens.dtype
            and value.shape == (*index.shape, tokens.shape[-1]) and _is_large(tokens, tokens.numel(), MIN_MOVED)):
        return original(tokens, index, value)
    rows = torch.arange(len(index), device=index.device).unsqueeze(1)
    return tokens.index_put((rows, index), value)


def mask_at_index(original, tokens: Tensor, index: Tensor, mask_token: Tensor) -> Tensor:
    """One pass that selects, for a mask of the size of the tokens and four passes of arithmetic."""
    if not _is_plain(tokens, index):
        return original(tokens, index, mask_token)
    mask = tokens.new_zeros(tokens.shape[:2], dtype=torch.bool).scatter_(1, index, True)
    return torch.where(mask.unsqueeze(-1), mask_token, tokens)


def _is_plain(tokens: Tensor, index: Tensor) -> bool:
    return (not is_transformed(tokens) and type(tokens) in (Tensor, nn.Parameter) and tokens.dim() == 3
            and tokens.dtype in _FLOATS and index.dtype == torch.int64 and index.dim() == 2
            and index.shape[0] == tokens.shape[0] and index.device == tokens.device)


def update_momentum(original, model: nn.Module, model_ema: nn.Module, m: float) -> None:
    """One pass over memory where two were."""
    source, target = list(model.parameters()), list(model_ema.parameters())
    is_ours = (len(source) == len(target) > 0 and not isinstance(m, Tensor) and 0 <= m <= 1 and not is_transformed(target[0])
               and _is_large(target[0], sum(t.numel() for t in target), MIN_AVERAGED)
               and all(type(t) is nn.Parameter and t.dtype in (torch.float32, torch.float64) and t.dtype == s.dtype
                       and t.shape == s.shape and t.device == s.device == target[0].device
                       for t, s in zip(target, source, strict=True)))
    if is_ours:
        ema_update_(target, source, m)
    else:
        original(model, model_ema, m)


# name -> what lightly's takes, and what runs in its place
_FUNCTIONS = {
    "get_at_index": (lambda tokens, index: 0, get_at_index),
    "set_at_index": (lambda tokens, index, value: 0, set_at_index),
    "mask_at_index": (lambda tokens, index, mask_token: 0, mask_at_index),
    "apply_masks": (lambda x, masks: 0, apply_masks),
    "update_momentum": (lambda model, model_ema, m: 0, update_momentum),
}
