"""stable-pretraining (github.com/rbalestr-lab/stable-pretraining): SIGReg as one op, the teacher in one pass over memory."""

import functools
import importlib
import sys

import torch
from torch import Tensor, nn

from ..nn.host_values import host_value
from ..nn.sigreg_sources import FlatEppsPulley, flat_sliced_epps_pulley
from ..ops import ema_update_
from ._report import PatchError, Report, check_signature
from ._sigreg import note_numerics, why_not_now

_LOSS, _TEACHER = "stable_pretraining.methods.lejepa", "stable_pretraining.backbone.utils"
_HOME = {"SlicedEppsPulley": _LOSS, "EppsPulley": _LOSS, "TeacherStudentWrapper": _TEACHER}


def matches(model: nn.Module) -> bool:
    return bool(_classes(model))


def apply(model: nn.Module | None = None, *, strict_numerics: bool = False) -> Report:
    """Replace the forward of SlicedEppsPulley and EppsPulley and TeacherStudentWrapper.update_teacher.

    From stable_pretraining.methods.lejepa and .backbone.utils. The original throws the result of its all-reduce away; here
    value and gradient are those of the global batch, and strict_numerics=True keeps the original's.
    """
    with Report.of("stable_pretraining") as report:
        classes = _imported() if model is None else _classes(model)
        if not classes:
            raise PatchError(f"model must have one of {', '.join(_HOME)}, has none; nothing was replaced")
        signatures = {"SlicedEppsPulley": ("forward", lambda self, x: 0), "EppsPulley": ("forward", lambda self, x: 0),
                      "TeacherStudentWrapper": ("update_teacher", lambda self: 0)}
        fast = {"SlicedEppsPulley": functools.partial(_sliced, strict_numerics=strict_numerics),
                "EppsPulley": functools.partial(_alone, strict_numerics=strict_numerics),
                "TeacherStudentWrapper": _update_teacher}
        for name, cls in classes.items():
            check_signature(getattr(cls, signatures[name][0]), signatures[name][1], f"{name}.{signatures[name][0]}")
        for name, cls in classes.items():
            report.replace_method(cls, signatures[name][0], fast[name], model)
        _patch_backbone(report, model)
        _say_what_differs(report, strict_numerics)
    return report


def _patch_backbone(report: Report, model: nn.Module | None) -> None:
    """timm's ViTs through their own patch."""
    if model is None:
        report.keep("ViTs of timm", "pass the model, or use jepa_fast.patches.timm")
        return
    timm = importlib.import_module(".timm", __package__)
    if timm.matches(model):
        report.take(timm.apply(model))


def _say_what_differs(report: Report, strict_numerics: bool) -> None:
    report.keep("callbacks, probes and other losses", "no part of a JEPA's step, or no fast version here")
    note_numerics(report)
    report.note("strict: under torch.distributed the loss is that of each rank's samples, times the number of ranks, as the "
                "original's all-reduce has no effect" if strict_numerics else
                "under torch.distributed value and gradient are those of the global batch, also where the module is made "
                "before the process group; the original throws its all-reduce away (strict_numerics=True does, too)")
    report.note("LeJEPA's loss stays invariance + lamb * SIGReg over all views as one sample; the paper has (1 - lamb) "
                "invariance + lamb * SIGReg per view (stable-pretraining#413)")


def _sliced(original, self, x: Tensor, *, strict_numerics: bool) -> Tensor:
    if x.dim() != 2 or why_not_now(x, self, self.num_slices, self.ep):
        return original(self, x)
    return flat_sliced_epps_pulley(self, x, strict_numerics)


def _alone(original, self, x: Tensor, *, strict_numerics: bool) -> Tensor:
    is_as_written = strict_numerics and self._is_ddp
    if is_as_written or x.dim() != 2 or why_not_now(x, self, x.shape[1], self, op="projection_sums", fewest=2048):
        return original(self, x)
    return FlatEppsPulley.forward(self, x)


@torch.no_grad()
def _update_teacher(original, self) -> None:
    """The original's arithmetic to the bit: float32 in one pass, and in its own way what is no float32, like a counter."""
    if torch.compiler.is_compiling():
        return original(self)
    momentum = host_value(self.ema_coefficient)
    if not self.training or momentum in (0.0, 1.0):
        return None
    teacher, student = self.teacher, self.student
    pairs = [*zip(teacher.parameters(), student.parameters(), strict=False),
             *zip(teacher.buffers(), student.buffers(), strict=False)]
    flat = [pair for pair in pairs if _is_flat(*pair)]
    ema_update_([t for t, _ in flat], [s for _, s in flat], momentum)
    for t, s in pairs:
        if not _is_flat(t, s):
            t.mul_(self.ema_coefficient.to(t.dtype)).add_((1.0 - self.ema_coefficient).to(t.dtype) * s)
    return None


def _is_flat(t: Tensor, s: Tensor) -> bool:
    is_plain = all(type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 for x in (t, s))
    return is_plain and t.shape == s.shape and t.device == s.device


def _imported() -> dict[str, type]:
    try:
        return {name: getattr(importlib.import_module(home), name) for name, home in _HOME.items()}
    except (ImportError, AttributeError) as error:
        raise PatchError(f"stable_pretraining must be importable: {error}") from error


def _classes(model: nn.Module) -> dict[str, type]:
    """The code base's classes in a model, by name; lejepa has an EppsPulley of its own."""
    classes = {}
    for cls in {type(part) for part in model.modules()}:
        home = sys.modules.get(cls.__module__)
        is_loss = cls.__name__ in ("SlicedEppsPulley", "EppsPulley") and hasattr(home, "SlicedEppsPulley")
        is_teacher = cls.__name__ == "TeacherStudentWrapper" and hasattr(cls, "update_teacher")
        if (is_loss or is_teacher) and not cls.__module__.startswith("jepa_fast."):
            classes[cls.__name__] = cls
    return classes
