"""eb_jepa (github.com/facebookresearch/eb_jepa): its BCS loss as one op, without complex [N, K, T] tensors."""

import functools
import importlib
import sys
import types

from torch import Tensor, nn

from .. import ops
from ..nn import sigreg_sources
from ..ops import Quadrature
from ..ops._distributed import resolve_group
from ._report import PatchError, Report, check_signature, modules_defining
from ._sigreg import note_numerics, why_not_now


def matches(model: nn.Module) -> bool:
    return any(_is_bcs(type(part)) for part in model.modules())


def apply(model: nn.Module | None = None, *, strict_numerics: bool = False) -> Report:
    """Replace BCS.forward and epps_pulley of eb_jepa.losses, the function wherever it was imported to.

    Of a model only BCS.forward. Under data parallelism the gradient is that of the global batch; strict_numerics=True keeps
    what autograd makes of the original's all-reduce (on gloo 1/W of it).
    """
    with Report.of("eb_jepa") as report:
        modules = _imported() if model is None else _modules_behind(model)
        for module in modules:
            check_signature(module.BCS.__init__, lambda self, num_slices=256, lmbd=10.0: 0, "BCS")
            check_signature(module.BCS.forward, lambda self, z1, z2: 0, "BCS.forward")
            check_signature(module.epps_pulley, lambda x, t_min=-3, t_max=3, n_points=10: 0, "epps_pulley")
        for module in modules:
            report.replace_method(module.BCS, "forward", functools.partial(_bcs, strict_numerics=strict_numerics), model)
            if model is None:
                everywhere = [m for m in list(sys.modules.values()) if isinstance(m, types.ModuleType)]
                report.replace_everywhere(module.epps_pulley, _epps_pulley(module.epps_pulley, strict_numerics), everywhere)
        report.keep("HingeStdLoss, CovarianceLoss, VCLoss, VICRegLoss, VC_IDM_Sim_Regularizer",
                    "one matrix product each, which PyTorch does well; what they read for the log is their interface")
        report.keep("CEMPlanner, MPPIPlanner", "jepa_fast.planning has both, with an interface of its own")
        note_numerics(report)
        report.note("strict: under torch.distributed the gradient is what autograd makes of the original's all-reduce, on "
                    "gloo 1/W of the right one" if strict_numerics else
                    "under torch.distributed the gradient is that of the global batch; the original's is 1/W of it on gloo "
                    "(strict_numerics=True keeps that)")
    return report


def _bcs(original, self, z1: Tensor, z2: Tensor, *, strict_numerics: bool) -> dict[str, Tensor]:
    if z1.dim() != 2 or z1.shape != z2.shape or z1.dtype != z2.dtype or why_not_now(z1, self, self.num_slices, fewest=128):
        return original(self, z1, z2)
    return sigreg_sources.bcs(self, z1, z2, strict_numerics)


def _epps_pulley(original, strict_numerics: bool):
    @functools.wraps(original)
    def epps_pulley(x, t_min=-3, t_max=3, n_points=10):
        is_as_written = strict_numerics and resolve_group("auto") is not None
        is_grid = t_min == -t_max and n_points > 1
        if is_as_written or not is_grid or x.dim() != 2 or why_not_now(x, nn.Identity(), x.shape[1], op="projection_sums",
                                                                       fewest=512):
            return original(x, t_min, t_max, n_points)
        return ops.epps_pulley(x, quadrature=Quadrature.trapezoid(t_min, t_max, n_points), scale="none",
                               process_group="auto", ddp_weighting="rank")

    epps_pulley.is_of_jepa_fast = True
    return epps_pulley


def _imported() -> list[types.ModuleType]:
    modules = modules_defining("BCS", "epps_pulley")
    if modules:
        return modules
    try:
        return [importlib.import_module("eb_jepa.losses")]
    except ImportError as error:
        raise PatchError(f"eb_jepa.losses must be importable or loaded: {error}") from error


def _modules_behind(model: nn.Module) -> list[types.ModuleType]:
    names = dict.fromkeys(type(part).__module__ for part in model.modules() if _is_bcs(type(part)))
    if not names:
        raise PatchError("model must have eb_jepa's BCS, has none; nothing was replaced")
    return [sys.modules[name] for name in names]


def _is_bcs(cls: type) -> bool:
    """A class named BCS beside a function epps_pulley: no package is named, files are often copied."""
    return cls.__name__ == "BCS" and hasattr(sys.modules.get(cls.__module__), "epps_pulley")
