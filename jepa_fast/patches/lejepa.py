"""lejepa (github.com/rbalestr-lab/lejepa): SIGReg as one op, without a [..., N, K, T] tensor."""

import importlib
import sys

from torch import Tensor, nn

from ..nn.sigreg_sources import EppsPulley, sliced_epps_pulley
from ._report import PatchError, Report, check_signature
from ._sigreg import note_numerics, why_not_now


def matches(model: nn.Module) -> bool:
    return bool(_classes(model))


def apply(model: nn.Module | None = None, *, strict_numerics: bool = False) -> Report:
    """Replace the forward of SlicingUnivariateTest, where its test is an EppsPulley, and of EppsPulley alone.

    From lejepa.multivariate.slicing and lejepa.univariate.epps_pulley; of a model, whatever the modules are called. Values
    and gradients are exact under data parallelism as in the original: strict_numerics changes nothing.
    """
    with Report.of("lejepa") as report:
        classes = _imported() if model is None else _classes(model)
        if not classes:
            raise PatchError("model must have a SlicingUnivariateTest or an EppsPulley of lejepa, has neither; nothing was "
                             "replaced")
        slicing, epps_pulley = classes.get("SlicingUnivariateTest"), classes.get("EppsPulley")
        if epps_pulley:
            check_signature(epps_pulley.__init__, lambda self, t_max=3, n_points=17, integration="trapezoid": 0,
                            "EppsPulley")
            check_signature(epps_pulley.forward, lambda self, x: 0, "EppsPulley.forward")
        if slicing:
            check_signature(slicing.forward, lambda self, x: 0, "SlicingUnivariateTest.forward")
            check_signature(slicing._get_generator, lambda self, device, seed: 0, "SlicingUnivariateTest._get_generator")
            report.replace_method(slicing, "forward", _sliced(epps_pulley), model)
        if epps_pulley:
            report.replace_method(epps_pulley, "forward", _alone, model)
        _say_what_stays(report, model)
        note_numerics(report)
        report.note("under torch.distributed global_step is still read on the host in each call, as all ranks take the "
                    "largest; on one process only where somebody else wrote it")
    return report


def _sliced(epps_pulley: type | None):
    def fast(original, self, x: Tensor) -> Tensor:
        test = self.univariate_test
        if type(test) is not epps_pulley or self.reduction not in ("mean", "sum", None):
            return original(self, x)
        return original(self, x) if why_not_now(x, self, self.num_slices, test) else sliced_epps_pulley(self, x)
    return fast


def _alone(original, self, x: Tensor) -> Tensor:
    why = why_not_now(x, self, x.shape[-1], self, op="projection_sums", fewest=2048)
    return original(self, x) if why else EppsPulley.forward(self, x)


def _imported() -> dict[str, type]:
    try:
        return {"SlicingUnivariateTest": importlib.import_module("lejepa.multivariate.slicing").SlicingUnivariateTest,
                "EppsPulley": importlib.import_module("lejepa.univariate.epps_pulley").EppsPulley}
    except (ImportError, AttributeError) as error:
        raise PatchError(f"lejepa must be importable with its SlicingUnivariateTest and EppsPulley: {error}") from error


def _classes(model: nn.Module) -> dict[str, type]:
    """lejepa's classes in a model, by name; stable-pretraining's EppsPulley stands beside a SlicedEppsPulley."""
    classes = {cls for cls in map(type, model.modules()) if not cls.__module__.startswith("jepa_fast.")
               and not hasattr(sys.modules.get(cls.__module__), "SlicedEppsPulley")}
    return {cls.__name__: cls for cls in classes if cls.__name__ in ("SlicingUnivariateTest", "EppsPulley")}


def _say_what_stays(report: Report, model: nn.Module | None) -> None:
    if model is None:
        report.keep("AndersonDarling, CramerVonMises, ... of lejepa.univariate", "other tests, which sort their samples or "
                    "take moments; no training uses them")
        report.keep("BHEP, HZ, HV, ... of lejepa.multivariate", "other tests, of pairs of samples; no training uses them")
        return
    for part in model.modules():
        name = type(part).__name__
        if type(part).__module__.startswith("lejepa.") and name not in ("SlicingUnivariateTest", "EppsPulley"):
            report.keep(name, "another test, which has no fast version here")
