"""LeWorldModel: le-wm (`module.py`, `jepa.py`, in whatever package), stable-worldmodel's `wm.lewm` and `wm.loss.SIGReg`."""

import importlib
import sys
import types
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..nn.sigreg_sources import LeWMSIGReg
from ._lewm_rollout import roll, why_not_now
from ._report import PatchError, Report, check_signature, modules_behind, modules_defining
from ._sigreg import why_not_now as why_not_sigreg

_PARTS = ("Attention", "ConditionalBlock", "FeedForward", "Transformer", "Embedder")
_PREDICTORS = ("ARPredictor", "Predictor")      # le-wm, stable-worldmodel
_TINY = dict(num_frames=3, depth=2, heads=2, mlp_dim=8, input_dim=4, hidden_dim=4, dim_head=2)


def matches(model: nn.Module) -> bool:
    """Whether a model holds a world model, or a SIGReg, of that code."""
    modules = modules_behind(model)
    return bool(_worlds(modules) or _sigregs(modules))


def apply(model: nn.Module | None = None, *, strict_numerics: bool = False) -> Report:
    """Patch the classes, or one model.

    JEPA.rollout of le-wm, LeWM.rollout of stable-worldmodel: actions are embedded once, windows that grow keep their keys
    and values, only the newest row leaves the last layer. Training mode, hooks and compilation run the original.
    SIGReg of both: the statistic without its [..., N, K, knots] tensor, along the same directions.
    An encoder of Hugging Face is patched along, where a model is given.
    What is patched is first compared by value with the original, on a tiny model; PatchError where they differ.
    strict_numerics changes nothing here.
    """
    modules = None if model is None else modules_behind(model)
    with Report.of("lewm") as report:
        worlds, sigregs = _worlds(modules), _sigregs(modules)
        if not worlds and not sigregs:
            where = "no loaded module" if model is None else f"no part of a {type(model).__name__}"
            raise PatchError(f"lewm: {where} defines le-wm's JEPA or stable-worldmodel's LeWM with a rollout, or their "
                             f"SIGReg; import that code first")
        for world in worlds:
            _patch_rollout(report, world, modules, model)
        for sigreg in sigregs:
            _patch_sigreg(report, sigreg, model)
        if worlds:
            report.keep("ConditionalBlock.forward",
                        "products and the same random numbers of dropout are 70 % of a training step on a CPU")
            report.keep("get_cost, criterion", "they only call the encoder and rollout")
            _patch_encoder(report, worlds, model)
    return report


def _worlds(modules: list[types.ModuleType] | None) -> list[type]:
    found = [getattr(module, name) for name in ("JEPA", "LeWM") for module in modules_defining(name, among=modules)]
    return [cls for cls in found if isinstance(cls, type) and all(map(partial(hasattr, cls),
                                                                      ("encode", "predict", "rollout")))]


def _sigregs(modules: list[types.ModuleType] | None) -> list[type]:
    """Classes SIGReg(knots, num_proj); lightly's of the same name and ours are others."""
    found = (module.SIGReg for module in modules_defining("SIGReg", among=modules)
             if not module.__name__.startswith("jepa_fast."))
    return [cls for cls in found if list(_parameters(cls.__init__))[:3] == ["self", "knots", "num_proj"]]


def _parameters(function: Callable) -> tuple[str, ...]:
    code = getattr(function, "__code__", None)
    return code.co_varnames[:code.co_argcount] if code else ()


def _patch_rollout(report: Report, world: type, modules: list[types.ModuleType] | None, model: nn.Module | None) -> None:
    name = world.__name__
    predictors = tuple(getattr(module, predictor) for predictor in _PREDICTORS
                       for module in modules_defining(*_PARTS, predictor, among=modules))
    if not predictors:
        report.keep(f"{name}.rollout", f"no module defines {', '.join(_PARTS)} and {' or '.join(_PREDICTORS)}")
        return
    check_signature(world.predict, lambda self, emb, act_emb: 0, f"{name}.predict")
    check_signature(world.encode, lambda self, info: 0, f"{name}.encode")
    if world.rollout.__defaults__ == (3,):
        check_signature(world.rollout, lambda self, info, action_sequence, history_size=3: 0, f"{name}.rollout")
        rollout = _rollout_of_le_wm
    else:
        check_signature(world.rollout, lambda self, info, action_sequence, history_size=None: 0, f"{name}.rollout")
        rollout = _rollout_of_stable_worldmodel
    fast = partial(rollout, world, predictors)
    if not getattr(world.rollout, "is_of_jepa_fast", False):
        for predictor in predictors:
            _compare_rollouts(world, predictor, fast)
    report.replace_method(world, "rollout", fast, model)


def _rollout_of_le_wm(world, predictors, original, self, info, action_sequence, history_size: int = 3):
    """All T actions are in action_sequence [B, S, T, A], the first H of them with the H frames of info["pixels"]."""
    if "pixels" not in info or action_sequence.shape[2] < info["pixels"].shape[2] or _overrides(self, world) \
            or why_not_now(self, predictors, history_size):
        return original(self, info, action_sequence, history_size)
    B, S = action_sequence.shape[:2]
    info["action"] = action_sequence[:, :, :info["pixels"].shape[2]]
    info["emb"] = _encoded(self, info).unsqueeze(1).expand(B, S, -1, -1)
    return _rolled(self, info, action_sequence, history_size)


def _rollout_of_stable_worldmodel(world, predictors, original, self, info, action_sequence, history_size: int = None):
    """The H - 1 actions between the frames are in info["action_history"], those to come in action_sequence."""
    past, pixels = info.get("action_history"), info.get("pixels")
    history = getattr(self.predictor, "num_frames", 3) if history_size is None else history_size
    if pixels is None or pixels.shape[2] - 1 != (0 if past is None else past.shape[2]) or _overrides(self, world) \
            or why_not_now(self, predictors, history):
        return original(self, info, action_sequence, history_size)
    B, S = action_sequence.shape[:2]
    actions = action_sequence if past is None else torch.cat([past, action_sequence], 2)
    info["action"] = actions[:, :, :pixels.shape[2]]
    if "emb" not in info:
        info["emb"] = _encoded(self, info).detach().unsqueeze(1).expand(B, S, -1, -1)
    return _rolled(self, info, actions, history)


def _patch_encoder(report: Report, worlds: list[type], model: nn.Module | None) -> None:
    """Through the patches of Hugging Face, unless they have been there already."""
    patches = importlib.import_module(__package__)
    patches = [getattr(patches, name) for name in ("hf_vit", "hf_ijepa") if hasattr(patches, name)]
    found = False
    for world in [] if model is None else [part for part in model.modules() if type(part) in worlds]:
        for patch in patches:
            if patch.matches(world.encoder):
                found = True
                if not any(getattr(vars(part).get("forward"), "is_of_jepa_fast", False) for part in world.encoder.modules()):
                    report.take(patch.apply(world.encoder))
    if not found:
        report.keep("encoder", "pass a model with an encoder of Hugging Face, or patch it by itself")


def _overrides(self: nn.Module, world: type) -> bool:
    return type(self).predict is not world.predict or "predict" in vars(self)


def _encoded(self: nn.Module, info: dict) -> Tensor:
    """Of the first sample of each: all start from the same frames."""
    return self.encode({key: value[:, 0] for key, value in info.items() if torch.is_tensor(value)})["emb"]


def _rolled(self: nn.Module, info: dict, actions: Tensor, history: int) -> dict:
    embedded = self.action_encoder(actions.flatten(0, 1))
    rolled = roll(self, info["emb"].flatten(0, 1), embedded, history)
    info["predicted_emb"] = rolled.unflatten(0, actions.shape[:2])
    return info


def _patch_sigreg(report: Report, cls: type, model: nn.Module | None) -> None:
    check_signature(cls.__init__, lambda self, knots=17, num_proj=1024: 0, "SIGReg.__init__")
    check_signature(cls.forward, lambda self, proj: 0, "SIGReg.forward")
    if not getattr(cls.forward, "is_of_jepa_fast", False):
        if "cuda" in cls.forward.__code__.co_consts and not torch.cuda.is_available():
            report.keep("SIGReg.forward", "this version of it runs on a GPU only, and none is here")
            return
        _compare_sigregs(cls)
    report.replace_method(cls, "forward", _sigreg, model)
    report.note("SIGReg under autocast is float32; the original rounds its projections and its value to half precision")
    report.note("SIGReg under data parallelism is that of each process's own samples, as in the original; "
                "jepa_fast.SIGReg.from_preset('lewm', process_group='auto') is that of the global batch")


def _sigreg(original, self, proj):
    is_ours = why_not_sigreg(proj, self, self.num_proj, self) is None
    return LeWMSIGReg.forward(self, proj) if is_ours else original(self, proj)


# what is there, compared with what this was written for

class _Pixels(nn.Module):
    """An encoder whose CLS token is the mean pixel of each channel."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixels: Tensor, interpolate_pos_encoding: bool = False):
        return types.SimpleNamespace(last_hidden_state=self.scale * pixels.mean((-2, -1)).unsqueeze(1))


@torch.no_grad()
def _compare_rollouts(world: type, predictor: type, fast: Callable) -> None:
    """Windows that grow and slide, one context frame and two. PatchError where the code is not what this was written for."""
    embedder = sys.modules[predictor.__module__].Embedder
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        model = world(_Pixels(), predictor(**_TINY), embedder(input_dim=2, emb_dim=4)).eval()
        for parameter in model.parameters():
            parameter.normal_()
        for num_frames, history in ((1, 3), (2, 2), (2, 1)):
            info = {"pixels": torch.randn(2, 1, num_frames, 4, 2, 2).expand(-1, 3, -1, -1, -1, -1)}
            if fast.func is _rollout_of_stable_worldmodel and num_frames > 1:
                info["action_history"] = torch.randn(2, 3, num_frames - 1, 2)
            actions = torch.randn(2, 3, 5, 2)
            theirs = world.rollout(model, dict(info), actions, history)
            ours = fast(_never, model, dict(info), actions, history)
            for key in ("emb", "action", "predicted_emb"):
                if theirs[key].shape != ours[key].shape or not torch.allclose(theirs[key], ours[key], 1e-3, 1e-4):
                    raise PatchError(f"{world.__name__}.rollout of {world.__module__} with {predictor.__name__} computes "
                                     f"another {key} than this patch was written for; nothing was replaced")


@torch.no_grad()
def _compare_sigregs(cls: type) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # an early le-wm draws its directions on a GPU only
    with torch.random.fork_rng(), torch.autocast(device, enabled=False):
        model, x, losses = cls(knots=5, num_proj=3).to(device), torch.randn(2, 6, 4, device=device), []
        for forward in (cls.forward, LeWMSIGReg.forward):
            torch.manual_seed(0)
            losses.append(forward(model, x))
    if not torch.allclose(*losses, 1e-4, 1e-5):
        raise PatchError(f"SIGReg of {cls.__module__} computes {losses[0]:.6g} where this patch was written for code that "
                         f"computes {losses[1]:.6g}; nothing was replaced")


def _never(self, *arguments):
    raise PatchError("a tiny model of the same classes is computed by its own code: hooks for all modules are registered, "
                     "or it is being traced")
