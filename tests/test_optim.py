"""AdamWEMA in a loop: against torch.optim.AdamW plus the official average, golden data, checkpoints, clipping."""

import copy
import pathlib

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from jepa_fast import ops, testing
from jepa_fast.optim import AdamWEMA, clip_scale, param_groups

GOLDEN = load_file(pathlib.Path(__file__).parent / "golden/ijepa_model.safetensors")
BACKENDS = testing.OPS["adamw_ema_"].backends()


class Encoder(nn.Module):
    """A frozen table, a decaying token, weights, biases, a norm, and a parameter that never gets a gradient."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 8), requires_grad=False)
        self.mask_token = nn.Parameter(torch.randn(1, 1, 8))
        self.fc1, self.norm, self.fc2 = nn.Linear(8, 17), nn.LayerNorm(17), nn.Linear(17, 8)
        self.unused = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return self.fc2(self.norm(torch.tanh(self.fc1(x + self.pos_embed + self.mask_token))))


def models():
    encoder, predictor = Encoder(0), Encoder(1)
    return encoder, predictor, copy.deepcopy(encoder).requires_grad_(False)


def batches(steps, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    return [torch.randn(4, 5, 8, generator=g).to(dtype) for _ in range(steps)]


def train(encoder, predictor, target, optimizer, data, start=0):
    """The official step; the average is the optimizer's own, or the official expression after PyTorch's."""
    for step, x in enumerate(data, start):
        momentum = 0.9 + 0.005 * step
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = 1e-3 * (step + 1)
            group["weight_decay"] = 0.0 if group.get("WD_exclude") else 0.05 * (i + 1)
        optimizer.zero_grad(set_to_none=True)
        (predictor(encoder(x)) - target(x)).square().mean().backward()
        if isinstance(optimizer, AdamWEMA):
            optimizer.momentum = momentum
        optimizer.step()
        if not isinstance(optimizer, AdamWEMA):
            official_average(target, encoder, momentum)
    return encoder, predictor, target, optimizer


@torch.no_grad()
def official_average(target, source, momentum):
    for t, s in zip(target.parameters(), source.parameters(), strict=True):
        t.mul_(momentum).add_((1.0 - momentum) * s)


def train_ours(data, **options):
    encoder, predictor, target = models()
    optimizer = AdamWEMA(param_groups([encoder, predictor], 0.05),
                         averages=zip(encoder.parameters(), target.parameters(), strict=True), **options)
    return train(encoder, predictor, target, optimizer, data)


def train_torch(data):
    encoder, predictor, target = (m.to(data[0].dtype) for m in models())
    optimizer = torch.optim.AdamW(param_groups([encoder, predictor], 0.05), foreach=False)
    return train(encoder, predictor, target, optimizer, data)


def parameters(*modules):
    return [p.detach() for module in modules for p in module.parameters()]


def test_twenty_steps_on_plain_are_torch_adamw_to_the_bit():
    data = batches(20)
    with ops.use_backend("plain"):
        ours = parameters(*train_ours(data)[:3])
    theirs = parameters(*train_torch(data)[:3])
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_steps_are_within_the_error_rule(backend):
    data = batches(20)
    with ops.use_backend(backend):
        ours = parameters(*train_ours(data)[:3])
    theirs = parameters(*train_torch(data)[:3])
    exact = parameters(*train_torch(batches(20, torch.float64))[:3])
    everything = [torch.cat([p.flatten() for p in ps]) for ps in (ours, theirs, exact)]
    assert testing.error(everything[0], everything[2]) <= 2 * testing.error(everything[1], everything[2]) + 2**-23


@pytest.mark.parametrize("backend", testing.OPS["adamw_ema_scalars_"].backends())
@pytest.mark.parametrize("shadows", [False, True])
def test_numbers_read_on_the_device_give_the_same_bits(backend, shadows, monkeypatch):
    """With a frozen table whose average is in no pass, and with the numbers sent before the backward pass."""
    data = batches(3 if backend == "triton" else 6)
    with ops.use_backend(backend):
        host = train_ours(data, shadows=shadows)
        monkeypatch.setattr(AdamWEMA, "reads_device", True)
        device = train_ours(data, shadows=shadows)
        assert all(torch.equal(x, y) for x, y in zip(parameters(*host[:3]), parameters(*device[:3]), strict=True))

        step = AdamWEMA.step

        def ahead(self, **options):
            # the first step makes the gradients that staging needs
            self.staged is not None and self.stage()
            return step(self, **options, is_staged=self.staged is not None)

        monkeypatch.setattr(AdamWEMA, "step", ahead)
        staged = train_ours(data, shadows=shadows)
    assert all(torch.equal(x, y) for x, y in zip(parameters(*host[:3]), parameters(*staged[:3]), strict=True))
    assert [s["step"] for s in staged[3].state.values()] == [s["step"] for s in host[3].state.values()]
    for mine, theirs in zip(staged[3].shadows.values() if shadows else (), (host[3].shadows or {}).values(), strict=False):
        assert torch.equal(mine, theirs)


def test_staging_needs_a_plan_and_a_device():
    _, _, _, optimizer = train_ours(batches(1))
    with pytest.raises(ValueError, match="^stage is for float32 parameters on CUDA, or where reads_device is set$"):
        optimizer.stage()
    optimizer.reads_device = True
    with pytest.raises(ValueError, match=r"^is_staged must follow stage\(\) with gradients for the same parameters$"):
        optimizer.step(is_staged=True)
    optimizer.momentum = 1.5
    with pytest.raises(ValueError, match=r"^momentum must be in \[0, 1\], got 1.5$"):
        optimizer.stage()


def test_frozen_and_missing_gradients():
    """No gradient: no decay, no state, but the average moves; frozen tables and strangers to the groups as well."""
    encoder, predictor, target = models()
    stranger, stranger_average = torch.ones(3), torch.zeros(3)
    pairs = [*zip(encoder.parameters(), target.parameters(), strict=True), (stranger, stranger_average)]
    with torch.no_grad():
        for t in target.parameters():
            t.zero_()
    optimizer = AdamWEMA(param_groups([encoder, predictor], 0.5), averages=pairs)
    before = {p: p.detach().clone() for p in [*encoder.parameters(), *predictor.parameters()]}
    predictor(encoder(batches(1)[0])).sum().backward()
    optimizer.momentum = 0.75
    optimizer.step()
    for p, old in before.items():
        assert torch.equal(p, old) == (p.grad is None)
        assert (p in optimizer.state) == (p.grad is not None)
    assert encoder.unused.grad is None and encoder.pos_embed.grad is None
    for s, t in pairs:
        assert torch.equal(t, torch.zeros_like(t).mul_(0.75).add_((1.0 - 0.75) * s.detach()))
    optimizer.momentum = None
    averages = [t.clone() for _, t in pairs]
    optimizer.step()
    assert all(torch.equal(t, old) for (_, t), old in zip(pairs, averages, strict=True))


def test_gradients_that_come_later():
    """Each parameter counts its own steps."""
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    twin = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer, reference = AdamWEMA([p, q], lr=0.1), torch.optim.AdamW(twin, lr=0.1, foreach=False)
    for step in range(4):
        for ours, theirs, has_grad in ((p, twin[0], True), (q, twin[1], step in (1, 3))):
            ours.grad = theirs.grad = torch.full((4,), 0.1 * (step + 1)) if has_grad else None
        optimizer.step()
        reference.step()
    assert [optimizer.state[x]["step"] for x in (p, q)] == [4, 2]
    torch.testing.assert_close([p, q], twin, rtol=1e-6, atol=0)


def test_groups_have_the_official_order():
    encoder, predictor, _ = models()
    groups = param_groups({"encoder": encoder, "predictor": predictor}, 0.05)
    weights = [["pos_embed", "mask_token", "unused", "fc1.weight", "fc2.weight"]] * 2
    others = [["fc1.bias", "norm.weight", "norm.bias", "fc2.bias"]] * 2
    for group, module, names in zip(groups, [encoder, predictor] * 2, weights + others, strict=True):
        named = dict(module.named_parameters())
        assert [id(p) for p in group["params"]] == [id(named[name]) for name in names]
    assert [group["weight_decay"] for group in groups] == [0.05, 0.05, 0.0, 0.0]
    assert [group.get("WD_exclude", False) for group in groups] == [False, False, True, True]
    assert [len(group["params"]) for group in param_groups(encoder, 0.1)] == [5, 4]
    optimizer = AdamWEMA(groups)
    optimizer.set_hyperparameters(lr=0.5, weight_decay=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 4
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2, 0.0, 0.0]


def module(role):
    """The golden parameters of a role under their official names."""
    root = nn.Module()
    for key in (k for k in GOLDEN if k.startswith(f"weights/{role}/")):
        *path, leaf = key.split("/")[2].split(".")
        owner = root
        for name in path:
            if name not in dict(owner.named_children()):
                owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        owner.register_parameter(leaf, nn.Parameter(GOLDEN[key].clone(), requires_grad="pos_embed" not in leaf))
    return root


def test_official_step():
    """Golden weights and gradients of I-JEPA through one step of everything."""
    roles = {role: module(role) for role in ("encoder", "predictor", "target_encoder")}
    encoder, predictor, target = roles.values()
    for role in ("encoder", "predictor"):
        for name, p in roles[role].named_parameters():
            p.grad = GOLDEN[f"grad/{role}/{name}"].clone() if f"grad/{role}/{name}" in GOLDEN else None
    pairs = [(p, target.get_parameter(name)) for name, p in encoder.named_parameters()]
    optimizer = AdamWEMA(param_groups([encoder, predictor], 0.0), averages=pairs)
    for group, lr, decay in zip(optimizer.param_groups, GOLDEN["train/lr"][0].tolist(),
                                GOLDEN["train/weight_decay"][0].tolist(), strict=True):
        group |= {"lr": lr, "weight_decay": decay}
    optimizer.momentum = GOLDEN["train/momentum"][0].item()
    optimizer.step()
    checked = [key for key in GOLDEN if key.startswith("after_step1/")]
    for key in checked:
        _, role, name = key.split("/")
        # PyTorch's square root, and so the last bit here, depends on the machine
        assert testing.error(roles[role].get_parameter(name).detach(), GOLDEN[key]) < 3e-7, key
    assert len(checked) == 88 and "after_step1/target_encoder/pos_embed" in checked


def test_state_from_torch_and_back():
    """Ten steps here, ten there, in both directions, are twenty steps of either."""
    data = batches(20)
    with ops.use_backend("plain"):
        expected = parameters(*train_ours(data)[:2])
        for ours_first in (True, False):
            first, second = (train_ours, train_torch) if ours_first else (train_torch, train_ours)
            *trained, optimizer = first(data[:10])
            state = copy.deepcopy(optimizer.state_dict())
            assert state["state"].keys() == train_torch(data[:1])[3].state_dict()["state"].keys()
            for values in state["state"].values():
                assert torch.equal(values["step"], torch.tensor(10.0)) and values["step"].dtype == torch.float32
            theirs = second(data[:1])
            for model, source in zip(theirs[:3], trained, strict=True):
                model.load_state_dict(source.state_dict())
            theirs[3].load_state_dict(state)
            train(*theirs, data[10:], start=10)
            assert all(torch.equal(x, y) for x, y in zip(parameters(*theirs[:2]), expected, strict=True)), ours_first


def test_own_state_continues_to_the_bit(tmp_path):
    data = batches(6)
    _, _, _, optimizer = train_ours(data)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    _, _, _, other = train_ours(data[:1])
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    first, second = optimizer.state_dict(), other.state_dict()
    assert first["param_groups"] == second["param_groups"]
    for index, values in first["state"].items():
        assert all(torch.equal(value, second["state"][index][name]) for name, value in values.items())
    assert all(isinstance(values["step"], int) for values in other.state.values())


def test_deep_copy_keeps_everything():
    encoder, predictor, target, optimizer = train_ours(batches(2), shadows=True)
    twin = copy.deepcopy(optimizer)
    assert twin.momentum == optimizer.momentum and len(twin.averages) == len(optimizer.averages)
    for _, average in twin.averages:
        assert torch.equal(twin.shadows[average], average.bfloat16())


def test_shadows_follow():
    encoder, predictor, target, optimizer = train_ours(batches(3), shadows=True)
    plain = parameters(*train_ours(batches(3))[:3])
    assert all(torch.equal(x, y) for x, y in zip(parameters(encoder, predictor, target), plain, strict=True))
    tensors = [p for m in (encoder, predictor, target) for p in m.parameters()]
    addresses = [optimizer.shadows[p].data_ptr() for p in tensors]
    for p in tensors:
        assert optimizer.shadows[p].dtype == torch.bfloat16 and torch.equal(optimizer.shadows[p], p.bfloat16())
    with torch.no_grad():
        encoder.fc1.weight.zero_()
    optimizer.refresh_shadows()
    assert not optimizer.shadows[encoder.fc1.weight].any()
    assert addresses == [optimizer.shadows[p].data_ptr() for p in tensors]
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(optimizer.shadows[late], late.bfloat16()) and not torch.equal(late, torch.ones(3))


def test_two_averages_of_one_parameter():
    p, fast, slow = nn.Parameter(torch.ones(3)), torch.zeros(3), torch.zeros(3)
    optimizer = AdamWEMA([p], averages=[(p, fast), (p, slow)])
    p.grad, optimizer.momentum = torch.ones(3), 0.5
    optimizer.step()
    assert torch.equal(fast, 0.5 * p.detach()) and torch.equal(slow, fast)


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping_is_that_of_torch(max_norm):
    """Norms, factors, and the step that follows, per role as V-JEPA does; both norms above or below the limit."""
    ours, theirs = train_ours(batches(1)), train_ours(batches(1))
    lists = [list(ours[0].parameters()), list(ours[1].parameters())]
    norms, scales = clip_scale(lists, max_norm)
    expected = [torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm) for module in theirs[:2]]
    assert torch.equal(norms, torch.stack(expected)) and norms.dtype == torch.float32
    assert bool((scales < 1).all()) == (max_norm < 1) and (max_norm < 1 or torch.equal(scales, torch.ones(2)))
    ours[3].step(grad_scale=scales.repeat(2))
    theirs[3].step()
    assert all(torch.equal(x, y) for x, y in zip(parameters(*ours[:3]), parameters(*theirs[:3]), strict=True))
    norm, scale = clip_scale(ours[0].parameters(), max_norm)
    assert torch.equal(norm, norms[0]) and torch.equal(scale, scales[0])


def test_clipping_without_gradients_and_in_half_precision():
    norm, scale = clip_scale([nn.Parameter(torch.ones(2))], 1.0)
    assert norm == 0 and scale == 1
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    p.grad = torch.full((1000,), 0.1, dtype=torch.bfloat16)
    norm, _ = clip_scale([p], 1.0)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(p.grad.double().norm().item(), rel=1e-6)


def test_closure():
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = AdamWEMA([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0 and p.item() < 2.0


def test_schedulers_of_torch_work():
    p = nn.Parameter(torch.ones(2))
    optimizer = AdamWEMA([p], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    p.grad = torch.ones(2)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def bad(**options):
    return AdamWEMA([nn.Parameter(torch.ones(2))], **options)


def with_state(**group):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    state = optimizer.state_dict()
    state["param_groups"][0] |= group
    return state


@pytest.mark.parametrize("call, error, message", [
    (lambda: bad(lr=-1.0), ValueError, "lr must be at least 0, got -1.0"),
    (lambda: bad(betas=(0.9, 1.0)), ValueError, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
    (lambda: bad(averages=[(torch.ones(2), torch.ones(3))]), ValueError,
     r"averages\[0\] must be \[2\] as its parameter, got \[3\]"),
    (lambda: bad().load_state_dict(with_state(amsgrad=True)), ValueError,
     "state_dict must be of an AdamW with amsgrad=False, got True"),
    (lambda: bad().load_state_dict(with_state() | {"state": {0: {"momentum_buffer": None}}}), ValueError,
     "state_dict must hold step, exp_avg and exp_avg_sq for each parameter, got momentum_buffer for parameter 0"),
    (lambda: bad().step(grad_scale=torch.ones(3)), ValueError,
     r"grad_scale must be \[\] or \[1\], one per group, got \[3\]"),
    (lambda: clip_scale([], 0.0), ValueError, "max_norm must be above 0, got 0.0"),
    (lambda: clip_scale([torch.ones(2), [torch.ones(2)]], 1.0), TypeError,
     "parameters must be tensors or lists of tensors, got a mixture"),
])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        call()


def test_betas_that_differ_between_groups():
    groups = [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(2))], "betas": (0.5, 0.9)}]
    with pytest.raises(ValueError, match="betas must be the same in all groups"):
        AdamWEMA(groups).step()
