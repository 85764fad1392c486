"""The one-pass step against torch.optim.AdamW to the bit, and what it refuses."""

import pytest
import torch

from jepa_fast import ops, testing

SPEC = testing.OPS["adamw_ema_"]
BACKENDS = SPEC.backends()
SHAPES = [(3, 5, 11), (64,), (70, 33), (), (1001,)]


def arguments(g, **changes):
    def normal(size=1.0):
        return [size * torch.randn(shape, generator=g) for shape in SHAPES]

    count = len(SHAPES)
    return {"params": normal(), "grads": normal(1e-2), "exp_avg": normal(1e-3),
            "exp_avg_sq": [v.square() for v in normal(1e-2)], "average": [], "shadow": [], "average_shadow": [],
            "lr": [1e-3] * count, "weight_decay": [0.05] * count, "step": [5] * count, "beta1": 0.9, "beta2": 0.999,
            "eps": 1e-8, "momentum": 0.9} | changes


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.95)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_steps_of_torch_adamw(backend, betas):
    """Moments to the bit; parameters too, but for C++, whose square root is correctly rounded and PyTorch's is not."""
    g = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=g) for shape in SHAPES]
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    exact = [torch.nn.Parameter(p.double()) for p in params]
    options = [{"params": [i], "lr": 1e-3 * (1 + i), "weight_decay": 0.1 * i} for i in range(len(SHAPES))]
    torch_step, exact_step = (
        torch.optim.AdamW([o | {"params": [p]} for o, p in zip(options, ps, strict=True)], betas=betas, foreach=False)
        for ps in (theirs, exact))
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for step in range(1, 21):
        grads = [1e-2 * torch.randn(shape, generator=g) for shape in SHAPES]
        for ps in (theirs, exact):
            for p, grad in zip(ps, grads, strict=True):
                p.grad = grad.to(p.dtype)
        torch_step.step()
        exact_step.step()
        with ops.use_backend(backend):
            ops.adamw_ema_(params, grads, m, v, [], [], [], [o["lr"] for o in options],
                           [o["weight_decay"] for o in options], [step] * len(params), *betas, 1e-8, 1.0)
    for i, (p, t, e) in enumerate(zip(params, theirs, exact, strict=True)):
        state = torch_step.state[t]
        assert torch.equal(m[i], state["exp_avg"]) and torch.equal(v[i], state["exp_avg_sq"])
        assert backend != "plain" or torch.equal(p, t)
        e = e.detach()
        assert testing.error(p, e) <= 2 * testing.error(t.detach(), e) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_average_and_shadows_are_of_the_new_values(backend):
    g = torch.Generator().manual_seed(1)
    a = arguments(g)
    a["average"] = [torch.randn(shape, generator=g) for shape in SHAPES[:3]]
    expected = [t.clone() for t in a["average"]]
    a["shadow"] = [torch.full(shape, torch.nan, dtype=torch.bfloat16) for shape in SHAPES]
    a["average_shadow"] = [torch.full(shape, torch.nan, dtype=torch.bfloat16) for shape in SHAPES[:3]]
    with ops.use_backend(backend):
        ops.adamw_ema_(**a)
    for t, p in zip(expected, a["params"], strict=False):
        t.mul_(0.9).add_((1.0 - 0.9) * p)
    for average, copy, t in zip(a["average"], a["average_shadow"], expected, strict=True):
        assert torch.equal(average, t) and torch.equal(copy, t.bfloat16())
    for copy, p in zip(a["shadow"], a["params"], strict=True):
        assert torch.equal(copy, p.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_is_a_product_before_the_step(backend):
    one, each = torch.tensor(0.37), torch.rand(len(SHAPES), generator=torch.Generator().manual_seed(2))
    for scale in (one, each):
        ours, other = (arguments(torch.Generator().manual_seed(3)) for _ in range(2))
        other["grads"] = [grad * (scale if scale.dim() == 0 else scale[i]) for i, grad in enumerate(other["grads"])]
        with ops.use_backend(backend):
            ops.adamw_ema_(**ours, grad_scale=scale)
            ops.adamw_ema_(**other)
        for name in ("params", "exp_avg", "exp_avg_sq"):
            for x, y in zip(ours[name], other[name], strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinite_gradients_stay_where_they_are(backend):
    a = arguments(torch.Generator().manual_seed(4))
    a["grads"][2][3, 4] = torch.nan
    a["grads"][2][5, 6] = torch.inf
    with ops.use_backend(backend):
        ops.adamw_ema_(**a)
    is_bad = ~a["params"][2].isfinite()
    assert is_bad[3, 4] and is_bad[5, 6] and is_bad.sum() == 2
    assert all(p.isfinite().all() for i, p in enumerate(a["params"]) if i != 2)


def test_threads_do_not_change_a_bit():
    case = next(c for c in SPEC.cases if c.name == "two-threads")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(testing.run(SPEC, testing.make(SPEC, case, torch.float32), BACKENDS[-1]))
    finally:
        torch.set_num_threads(before)
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


@pytest.mark.skipif(ops.COMPILED_MISSING is not None, reason=str(ops.COMPILED_MISSING))
def test_parameters_in_other_memory_order():
    """channels_last is not contiguous: plain PyTorch takes over, and C++ says why it does not."""
    g = torch.Generator().manual_seed(5)
    tensors = [torch.randn(4, 3, 2, 2, generator=g) for _ in range(3)]
    runs = []
    for order in (torch.contiguous_format, torch.channels_last):
        p, grad, v = (t.clone().to(memory_format=order) for t in tensors)
        rest = ([v.square()], [], [], [], [1e-3], [0.1], [1], 0.9, 0.999, 1e-8, 1.0)
        ops.adamw_ema_([p], [grad], [torch.zeros_like(p)], *rest)
        runs.append(p)
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-6, atol=1e-7)
    with ops.use_backend("cpp"), pytest.raises(RuntimeError, match="not contiguous"):
        ops.adamw_ema_([p], [grad], [torch.zeros_like(p)], *rest)


@pytest.mark.parametrize("changes, error, message", [
    ({"grads": []}, ValueError, "grads must have 5 tensors as params, got 0"),
    ({"exp_avg": [torch.ones(2)] * 5}, ValueError, r"exp_avg\[0\] must be \[3, 5, 11\] as params\[0\], got \[2\]"),
    ({"exp_avg_sq": [torch.zeros(s, dtype=torch.float64) for s in SHAPES]}, TypeError,
     r"exp_avg_sq\[0\] must be torch.float32 as params\[0\], got torch.float64"),
    ({"average": [torch.zeros(s) for s in [*SHAPES, ()]]}, ValueError,
     "average must have at most 5 tensors as params, got 6"),
    ({"average": [torch.zeros(2)]}, ValueError, r"average\[0\] must be \[3, 5, 11\] as params\[0\], got \[2\]"),
    ({"shadow": [torch.zeros(())]}, ValueError, "shadow must have 5 tensors as params, got 1"),
    ({"average_shadow": [torch.zeros(())]}, ValueError, "average_shadow must have 0 tensors as average, got 1"),
    ({"lr": [0.1]}, ValueError, "lr must have 5 numbers, one per parameter, got 1"),
    ({"step": [1, 2, 0, 3, 4]}, ValueError, "step must count from 1, got 0"),
    ({"momentum": -0.1}, ValueError, r"momentum must be in \[0, 1\], got -0.1"),
    ({"grad_scale": torch.ones(2)}, ValueError, r"grad_scale must be \[\] or \[5\], got \[2\]"),
    ({"grad_scale": torch.tensor(1)}, TypeError, "grad_scale must be float32, got torch.int64"),
    ({"params": [torch.zeros(s, dtype=torch.bfloat16) for s in SHAPES]}, TypeError,
     r"params\[0\] must be float32 or float64, got bfloat16"),
])
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        ops.adamw_ema_(**arguments(torch.Generator().manual_seed(6), **changes))


@pytest.mark.parametrize("backend", testing.OPS["adamw_ema_scalars_"].backends())
def test_scalars_from_a_tensor_give_the_same_bits(backend):
    """Also after the tensor was filled anew, as before the replay of a graph."""
    ours, theirs = (arguments(torch.Generator().manual_seed(7)) for _ in range(2))
    scalars = torch.empty(len(SHAPES), 5)
    for count, lr in ((5, 1e-3), (6, 2e-3)):
        changes = {"lr": [lr] * len(SHAPES), "step": [count] * len(SHAPES), "momentum": 1 - lr}
        theirs |= changes
        names = ("lr", "weight_decay", "step", "beta1", "beta2", "momentum")
        scalars.copy_(ops.adamw_ema_scalars(*(theirs[name] for name in names)))
        lists = {k: v for k, v in ours.items() if k not in ("lr", "weight_decay", "step", "momentum")}
        with ops.use_backend(backend):
            ops.adamw_ema_scalars_(**lists, scalars=scalars)
            ops.adamw_ema_(**theirs)
    for name in ("params", "exp_avg", "exp_avg_sq", "average"):
        for x, y in zip(ours[name], theirs[name], strict=True):
            assert torch.equal(x, y), name


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not installed")
def test_captured_tables_live_as_long_as_the_scalars(monkeypatch):
    """A CUDA graph reads both; numbers of the host are refused, which it would take from memory that is gone."""
    from jepa_fast.kernels import _tensor_lists, adamw_ema
    a = arguments(torch.Generator().manual_seed(8))
    lists = {k: v for k, v in a.items() if k not in ("lr", "weight_decay", "step", "momentum")}
    scalars = torch.ones(len(SHAPES), 5)
    with ops.use_backend("triton"):
        ops.adamw_ema_scalars_(**lists, scalars=scalars)
        assert scalars not in adamw_ema._CAPTURED
        monkeypatch.setattr(adamw_ema, "is_capturing", lambda device: True)
        ops.adamw_ema_scalars_(**lists, scalars=scalars)
    assert adamw_ema._CAPTURED[scalars]
    del scalars
    assert not len(adamw_ema._CAPTURED)
    monkeypatch.setattr(_tensor_lists, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="lists that it was called with before the capture"):
        _tensor_lists.to_device([1], torch.int64, torch.device("cpu"))


def test_scalars_of_another_shape():
    a = arguments(torch.Generator().manual_seed(6))
    lists = {k: v for k, v in a.items() if k not in ("lr", "weight_decay", "step", "momentum")}
    with pytest.raises(ValueError, match=r"^scalars must be \[5, 5\] float32, got \[5\] torch.float32$"):
        ops.adamw_ema_scalars_(**lists, scalars=torch.zeros(5))
