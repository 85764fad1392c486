"""A step in plain PyTorch, in the official manner ("official style") or tuned; the models are in style_*.py."""

import torch
from torch import Tensor, nn

from jepa_fast.optim import param_groups
from jepa_fast.train.host_memory import keep_freed_memory

from .ours import on_device
from .style_blocks import Manner
from .work import Work, to_float
from .worker import Batches

ROLES = ("encoder", "predictor", "projector")


def official(work: Work) -> Manner:
    """As the authors' loops have it."""
    shared = dict(makes_tables=False, has_scaler=True, is_fused=False, keeps_memory=False)
    return {"ijepa": Manner(is_unfused=True, logs="gradients", average="loop", **shared),
            "vjepa": Manner(logs="gradients, moments", average="loop", **shared),
            "vjepa2": Manner(is_checkpointed=True, logs="loss", **shared),
            "ac": Manner(is_checkpointed=True, logs="loss", **shared),
            "lejepa": Manner(logs="loss", **shared)}[work.family]


def tuned(is_compiled: bool) -> Manner:
    """What a good user of PyTorch makes of it: SDPA, fused AdamW, foreach averages, tables made once, no stops, no
    GradScaler, no recomputation; with or without torch.compile of the blocks."""
    return Manner(is_compiled=is_compiled)


def build(work: Work, manner: Manner) -> nn.Module:
    from .style_ac import ActionStep
    from .style_image import ImageStep
    from .style_lejepa import ViewStep
    from .style_video import VideoStep

    step = {"ijepa": ImageStep, "vjepa": VideoStep, "vjepa2": VideoStep, "ac": ActionStep, "lejepa": ViewStep}
    model = step[work.family](work.recipe.objective, manner)
    for role, state in work.weights().items():
        if role in ROLES:
            getattr(model, role).load_state_dict(state)
        if role == "encoder" and hasattr(model, "target_encoder"):
            model.target_encoder.load_state_dict(state)
    return model.to(work.device)


def loop(work: Work, batches: Batches, *, manner: Manner) -> None:
    # officially the data loader's processes normalise, and float32 travels; tuned, uint8 does
    is_official = not manner.makes_tables
    batches.prepare(lambda inputs: {name: to_float(name, value) if is_official and value.dtype == torch.uint8 else value
                                    for name, value in inputs.items()})
    recipe, model = work.recipe, build(work, manner)
    roles = {name: getattr(model, name) for name in ROLES if hasattr(model, name)}
    trained = {name: role for name, role in roles.items() if any(p.requires_grad for p in role.parameters())}
    groups = param_groups(trained, 0.0)
    # PyTorch's own AdamW with its own default of foreach or not, or its fused version
    optimizer = torch.optim.AdamW(groups, betas=recipe.optim.betas, eps=recipe.optim.eps, fused=manner.is_fused or None)
    torch.backends.cudnn.benchmark = True
    if manner.keeps_memory and work.device.type == "cpu":
        keep_freed_memory()
    is_half, device = recipe.train.precision == "bf16", work.device
    scaler = torch.amp.GradScaler("cuda") if manner.has_scaler and is_half and device.type == "cuda" else None
    batches.regions(**regions_of(work, model))
    for step, (inputs, masks) in enumerate(batches):
        batch = on_device(inputs, work)
        masks = {name: [index.to(device, non_blocking=True) for index in lists] for name, lists in masks.items()}
        set_schedules(optimizer, work, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_half):
            loss = model.loss(batch, masks)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        read_statistics(manner, trained, optimizer)
        optimizer.zero_grad(set_to_none=True)
        if hasattr(model, "target_encoder") and hasattr(recipe.objective, "momentum"):
            move_average(model, recipe.objective.momentum(step, work.horizon), manner.average)
        batches.record(float(loss.detach()) if manner.logs else loss)


def regions_of(work: Work, model: nn.Module) -> dict:
    names = {"ac": {"target": "encoder", "predictor": "predictor"}, "lejepa": {"context": "encoder"}}
    usual = {"context": "encoder", "target": "target_encoder", "predictor": "predictor"}
    return {region: (getattr(model, name), "forward") for region, name in names.get(work.family, usual).items()}


def set_schedules(optimizer: torch.optim.Optimizer, work: Work, step: int) -> None:
    optim = work.recipe.optim
    for group in optimizer.param_groups:
        group["lr"] = optim.lr(step, work.horizon)
        if optim.decay_all or not group.get("WD_exclude"):
            group["weight_decay"] = optim.weight_decay(step, work.horizon)


def read_statistics(manner: Manner, trained: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """One number per weight, read on the host, as the official loggers do."""
    if "gradients" not in manner.logs:
        return
    roles = trained.values() if "moments" in manner.logs else [trained["encoder"]]
    for role in roles:
        for name, parameter in role.named_parameters():
            if parameter.grad is not None and not (name.endswith(".bias") or parameter.ndim == 1):
                float(torch.norm(parameter.grad))
    if "moments" in manner.logs:
        for state in optimizer.state.values():
            float(state["exp_avg"].abs().mean())
            float(state["exp_avg_sq"].abs().mean())


@torch.no_grad()
def move_average(model: nn.Module, momentum: float, how: str) -> None:
    sources: list[Tensor] = list(model.encoder.parameters())
    averages = list(model.target_encoder.parameters())
    if how == "foreach":
        torch._foreach_mul_(averages, momentum)
        torch._foreach_add_(averages, sources, alpha=1 - momentum)
        return
    for source, average in zip(sources, averages, strict=True):
        average.mul_(momentum).add_((1.0 - momentum) * source)
