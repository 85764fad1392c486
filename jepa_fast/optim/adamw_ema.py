"""AdamW whose step also moves the averages and writes the bfloat16 copies, in one pass over memory."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import adamw_ema_, adamw_ema_scalars, adamw_ema_scalars_, ema_update_
from .clip import local


@dataclass(frozen=True)
class _Plan:
    """The arguments of `adamw_ema_` that stay the same as long as the same parameters have gradients."""

    has_grad: list[bool]
    params: list[Tensor]                  # those with gradients; first the ones with an average
    group: list[int]
    states: list[dict]
    values: list[Tensor]                  # this and the next five: this rank's rows, where parameters are DTensors
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    average: list[Tensor]
    shadow: list[Tensor]
    average_shadow: list[Tensor]
    rest: list[tuple[Tensor, Tensor]]     # (source, average) that the one pass does not reach: frozen, without gradient
    group_index: Tensor                   # `group` on the device


@dataclass(frozen=True)
class _Staged:
    """Device memory for the numbers of one step, written anew before each."""

    plan: _Plan
    numbers: Tensor      # [5 n + 2]
    scalars: Tensor      # [n, 5] of them, for `adamw_ema_scalars_`; one object, for as long as a graph may read it
    keep: Tensor         # []: momentum
    take: Tensor         # []: 1 - momentum

    @classmethod
    def empty(cls, plan: _Plan) -> "_Staged":
        numbers = torch.empty(5 * len(plan.params) + 2, device=plan.params[0].device)
        return cls(plan, numbers, numbers[:-2].view(-1, 5), numbers[-2], numbers[-1])


class AdamWEMA(torch.optim.Optimizer):
    """torch.optim.AdamW, and after every step average = momentum * average + (1 - momentum) * parameter.

    averages: pairs (parameter, its moving average); parameters that are frozen, without gradient or in no group are
        averaged all the same (the official EMA includes the fixed position tables).
    momentum: attribute, to be set before each step; None leaves the averages alone in that step.
    shadows: keep bfloat16 copies of parameters and averages in `self.shadows[tensor]`, written by the same pass; call
        `refresh_shadows` after changing weights in any other way, loading them included.
    Of DTensors (FSDP2) every rank steps its own rows: sources and averages must be cut alike, and nothing is sent.

    betas and eps are the same in all groups; lr and weight_decay are read from the groups in every step. A parameter
    without gradient is left alone, decay included. `state_dict` has the layout of torch.optim.AdamW and loads from it
    and into it; averages are not in it, since a target encoder saves itself.
    reads_device: what changes from step to step (lr, weight_decay, bias corrections, momentum) is read from device memory,
        so that a CUDA graph of `step(is_staged=True)` can be replayed after `stage()`; None: on CUDA. Same bits.
    """

    reads_device: bool | None = None
    momentum: float | None = None
    averages: list[tuple[Tensor, Tensor]] = []
    shadows: dict[Tensor, Tensor] | None = None
    _plan: _Plan | None = None
    _staged: _Staged | None = None

    def __init__(self, params: Iterable, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 1e-2, averages: Iterable[tuple[Tensor, Tensor]] = (),
                 shadows: bool = False):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        averages = list(averages)
        for i, (source, average) in enumerate(averages):
            if source.shape != average.shape:
                raise ValueError(f"averages[{i}] must be {list(source.shape)} as its parameter, "
                                 f"got {list(average.shape)}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.averages = averages
        if shadows:
            self.refresh_shadows()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None, grad_scale: Tensor | None = None,
             is_staged: bool = False) -> Tensor | None:
        """One step of every parameter that has a gradient, and of every average if `momentum` is set.

        grad_scale float32 multiplies the gradients: [] for all, or [num_groups], one per group (see `clip_scale`).
        is_staged: `stage` was called for this step; nothing is read from the host then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._current_plan()
        if grad_scale is not None and grad_scale.dim():
            if grad_scale.shape != (len(self.param_groups),):
                raise ValueError(f"grad_scale must be [] or [{len(self.param_groups)}], one per group, "
                                 f"got {list(grad_scale.shape)}")
            grad_scale = grad_scale[plan.group_index]
        if is_staged and self.staged is None:
            raise ValueError("is_staged must follow stage() with gradients for the same parameters")
        if is_staged or self._reads_device(plan):
            if not is_staged:
                self.stage()
            self._step_from_device(plan, grad_scale)
        else:
            self._step_from_host(plan, grad_scale)
        return loss

    def stage(self) -> None:
        """Send the numbers of the next step to the device, without waiting for it, and count that step.

        Parameters must have their gradients, whatever is in them. Pinned memory is not used again before it was copied.
        """
        plan = self._current_plan()
        if not self._reads_device(plan):
            raise ValueError("stage is for float32 parameters on CUDA, or where reads_device is set")
        *lists, momentum = self._host_numbers(plan)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        numbers = torch.cat([adamw_ema_scalars(*lists, momentum).flatten(), torch.tensor([momentum, 1 - momentum])])
        if self.staged is None:
            self._staged = _Staged.empty(plan)
        self.staged.copy_(numbers.pin_memory() if plan.params[0].is_cuda else numbers, non_blocking=True)
        self._count(plan)

    @property
    def staged(self) -> Tensor | None:
        """The device memory that `stage` fills; another one where parameters, state or their gradients changed places."""
        return None if self._staged is None or self._staged.plan is not self._plan else self._staged.numbers

    def _step_from_host(self, plan: _Plan, grad_scale: Tensor | None) -> None:
        lr, decay, steps, beta1, beta2, momentum = self._host_numbers(plan)
        adamw_ema_(*self._lists(plan), lr, decay, steps, beta1, beta2, self._shared("eps"), momentum, grad_scale)
        self._count(plan)
        if self.momentum is not None and plan.rest:
            averages = [average for _, average in plan.rest]
            ema_update_([local(t) for t in averages], [local(source) for source, _ in plan.rest], self.momentum)
            self._copy_shadows(averages)

    def _step_from_device(self, plan: _Plan, grad_scale: Tensor | None) -> None:
        staged, (beta1, beta2) = self._staged, self._shared("betas")
        adamw_ema_scalars_(*self._lists(plan), staged.scalars, beta1, beta2, self._shared("eps"), grad_scale)
        if self.momentum is not None and plan.rest:
            averages = [local(average) for _, average in plan.rest]
            sources = [local(source).to(average.dtype) for source, average in plan.rest]
            torch._foreach_mul_(averages, staged.keep)
            torch._foreach_add_(averages, torch._foreach_mul(sources, staged.take))
            self._copy_shadows([average for _, average in plan.rest])

    def _lists(self, plan: _Plan) -> list[list[Tensor]]:
        moves = self.momentum is not None
        return [plan.values, [local(p.grad) for p in plan.params], plan.exp_avg, plan.exp_avg_sq,
                plan.average if moves else [], plan.shadow, plan.average_shadow if moves else []]

    def _host_numbers(self, plan: _Plan) -> tuple:
        """lr, weight_decay, step (lists with one entry per parameter), beta1, beta2, momentum of the next step."""
        lr, decay = ([float(group[key]) for group in self.param_groups] for key in ("lr", "weight_decay"))
        return ([lr[i] for i in plan.group], [decay[i] for i in plan.group], [state["step"] + 1 for state in plan.states],
                *self._shared("betas"), 1.0 if self.momentum is None else self.momentum)

    def _count(self, plan: _Plan) -> None:
        for state in plan.states:
            state["step"] += 1

    def _copy_shadows(self, averages: list[Tensor]) -> None:
        if self.shadows is not None:
            for average in averages:
                self.shadows[average].copy_(average)

    def _reads_device(self, plan: _Plan) -> bool:
        if self.reads_device is not None or not plan.params:
            return bool(self.reads_device) and bool(plan.params)
        return plan.params[0].is_cuda and all(t.dtype == torch.float32 for t in plan.params + plan.average)

    def set_hyperparameters(self, *, lr: float | None = None, weight_decay: float | None = None) -> None:
        """The learning rate of every group, and the weight decay of those not marked `WD_exclude`."""
        for group in self.param_groups:
            if lr is not None:
                group["lr"] = lr
            if weight_decay is not None and not group.get("WD_exclude"):
                group["weight_decay"] = weight_decay

    @torch.no_grad()
    def refresh_shadows(self) -> None:
        """Write all bfloat16 copies anew (into the same memory where they exist)."""
        shadows = self.shadows if self.shadows is not None else {}
        for value in [p for group in self.param_groups for p in group["params"]] + [a for _, a in self.averages]:
            if value in shadows:
                shadows[value].copy_(value)
            else:
                shadows[value] = value.detach().to(torch.bfloat16, copy=True)
        self.shadows, self._plan = shadows, None

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        self._plan = None
        if self.shadows is not None:
            self.refresh_shadows()

    def state_dict(self) -> dict:
        """In the layout of torch.optim.AdamW: `step` float32 [], `exp_avg`, `exp_avg_sq` per parameter index."""
        packed = super().state_dict()
        packed["state"] = {index: state | {"step": torch.tensor(float(state["step"]))}
                           for index, state in packed["state"].items()}
        return packed

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes a state of this class or of torch.optim.AdamW (without amsgrad, maximize)."""
        for group in state_dict["param_groups"]:
            for option, expected in (("amsgrad", False), ("maximize", False), ("decoupled_weight_decay", True)):
                if group.get(option, expected) != expected:
                    raise ValueError(f"state_dict must be of an AdamW with {option}={expected}, got {group[option]}")
        for index, state in state_dict["state"].items():
            if not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
                raise ValueError(f"state_dict must hold step, exp_avg and exp_avg_sq for each parameter, got "
                                 f"{', '.join(map(str, state)) or 'nothing'} for parameter {index}")
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict:
        own = {"momentum": self.momentum, "averages": self.averages, "shadows": self.shadows}
        return super().__getstate__() | own

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._plan = self._staged = None
        for values in self.state.values():
            if "step" in values:  # a tensor in torch.optim.AdamW; here a plain number, so that no step reads a device
                values["step"] = int(values["step"])

    def _shared(self, key: str):
        values = [tuple(group[key]) if key == "betas" else group[key] for group in self.param_groups]
        if any(value != values[0] for value in values):
            raise ValueError(f"{key} must be the same in all groups, got {values}")
        return values[0]

    def _current_plan(self) -> _Plan:
        has_grad = [p.grad is not None for group in self.param_groups for p in group["params"]]
        if self._plan is None or self._plan.has_grad != has_grad:
            self._plan = self._make_plan(has_grad)
        return self._plan

    def _make_plan(self, has_grad: list[bool]) -> _Plan:
        active = [(p, i) for i, group in enumerate(self.param_groups) for p in group["params"] if p.grad is not None]
        average_of, rest = {}, []
        is_active = {p for p, _ in active}
        for source, average in self.averages:
            if source in is_active and source not in average_of:
                average_of[source] = average
            else:
                rest.append((source, average))
        active.sort(key=lambda item: item[0] not in average_of)
        params = [p for p, _ in active]
        for p in params:
            if p.grad.is_sparse:
                raise TypeError(f"gradients must be dense, got a sparse one for a parameter {list(p.shape)}")
            if not self.state[p]:
                self.state[p] |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        average = [average_of[p] for p in params[: len(average_of)]]
        shadow_of = self.shadows or {}
        return _Plan(
            has_grad=has_grad, params=params, group=[i for _, i in active], states=[self.state[p] for p in params],
            values=[local(p) for p in params], exp_avg=[local(self.state[p]["exp_avg"]) for p in params],
            exp_avg_sq=[local(self.state[p]["exp_avg_sq"]) for p in params], average=[local(a) for a in average],
            shadow=[local(shadow_of[p]) for p in params if shadow_of],
            average_shadow=[local(shadow_of[a]) for a in average if shadow_of], rest=rest,
            group_index=torch.tensor([i for _, i in active], dtype=torch.int64,
                                     device=params[0].device if params else None))

