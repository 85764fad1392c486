"""The loss against official values, PyTorch's own functions and float64; special values, statistics, bad input."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from jepa_fast import ops, testing
from jepa_fast.ops import gather_patches, latent_loss

GOLDEN = Path(__file__).parent / "golden"
BACKENDS = testing.OPS["latent_loss"].backends()


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def official_rows(golden, num_targets, num_contexts):
    """target_idx of the official prediction: target list after target list, repeated per context, then images."""
    B, N, _ = golden["out/target_full"].shape
    lists = [golden[f"input/step1/target{i}"].long() + N * torch.arange(B).unsqueeze(1) for i in range(num_targets)]
    return torch.cat([rows for rows in lists for _ in range(num_contexts)]).flatten()


OFFICIAL = [pytest.param("ijepa_model", 4, 1, id="ijepa_model"),
            pytest.param("ijepa_two_contexts", 3, 2, id="ijepa_two_contexts")]


@pytest.mark.parametrize("name, num_targets, num_contexts", OFFICIAL)
def test_official_loss_and_gradient(backend, name, num_targets, num_contexts):
    golden = load_file(GOLDEN / f"{name}.safetensors")
    prediction = golden["out/prediction"].flatten(0, 1).requires_grad_()
    target_idx = official_rows(golden, num_targets, num_contexts)
    loss = latent_loss(prediction, golden["out/target_full"].flatten(0, 1), target_idx)
    assert abs(loss.item() / golden["train/loss"][0].item() - 1) < 2e-6
    # the official normalised and gathered targets, through PyTorch's own loss
    expected = torch.autograd.grad(F.smooth_l1_loss(prediction, golden["out/target"].flatten(0, 1)), prediction)[0]
    assert testing.error(torch.autograd.grad(loss, prediction)[0], expected) < 5e-6


def target_encoder(golden, pixels, num_heads):
    """The official target encoder on all patches, written out; `pixels` decides the precision."""
    weights = {name.removeprefix("weights/target_encoder/"): value.to(pixels.dtype)
               for name, value in golden.items() if name.startswith("weights/target_encoder/")}
    patch_weight = weights["patch_embed.proj.weight"]
    patches = gather_patches(pixels, None, tuple(patch_weight.shape[2:]))
    x = F.linear(patches, patch_weight.flatten(1), weights["patch_embed.proj.bias"]) + weights["pos_embed"]

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    depth = sum(name.endswith("attn.qkv.weight") for name in weights)
    for block in (f"blocks.{i}" for i in range(depth)):
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).unflatten(-1, (3, num_heads, -1))
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        x = x + linear(f"{block}.attn.proj", attended)
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))))
    return norm("norm", x)


@pytest.mark.parametrize("name, num_targets, num_contexts", OFFICIAL)
def test_official_loss_in_float64_from_pixels(name, num_targets, num_contexts):
    """A wrong epsilon, patch order or row cannot hide in rounding here."""
    golden = load_file(GOLDEN / f"{name}.safetensors")
    target = target_encoder(golden, golden["input/step1/pixels"].double(), num_heads=2)
    assert testing.error(golden["out/target_full"], target) < 5e-6
    prediction = golden["f64/out/prediction"].flatten(0, 1)
    loss = latent_loss(prediction, target.flatten(0, 1), official_rows(golden, num_targets, num_contexts))
    assert abs(loss.item() / golden["f64/train/loss"][0].item() - 1) < 1e-10


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_equals_layer_norm_gather_and_smooth_l1(dtype, beta):
    """Loss and gradient against PyTorch's functions in float64, on the same rounded numbers."""
    prediction, target = draw(60, 45).to(dtype).requires_grad_(), draw(20, 45, seed=1).to(dtype)
    target_idx = torch.randint(0, 20, (60,), generator=torch.Generator().manual_seed(2))
    loss = latent_loss(prediction, target, target_idx, beta=beta)
    exact_prediction = prediction.detach().double().requires_grad_()
    exact = F.smooth_l1_loss(exact_prediction, F.layer_norm(target.double(), (45,))[target_idx], beta=beta)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-7
    torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=0)
    grad, exact_grad = torch.autograd.grad(loss, prediction)[0], torch.autograd.grad(exact, exact_prediction)[0]
    assert testing.error(grad, exact_grad) < (1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps)


def test_prediction_and_target_of_different_precision(backend):
    """What autocast gives: a bfloat16 prediction against a float32 target, and the reverse."""
    for dtypes in [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]:
        prediction, target = draw(30, 50).to(dtypes[0]).requires_grad_(), draw(30, 50, seed=1).to(dtypes[1])
        loss = latent_loss(prediction, target)
        exact = F.smooth_l1_loss(prediction.detach().double(), F.layer_norm(target.double(), (50,)))
        assert abs(loss.item() / exact.item() - 1) < 2e-7 and loss.dtype == torch.float32
        assert torch.autograd.grad(loss, prediction)[0].dtype == dtypes[0]


def test_weight_gives_each_mask_kind_its_mean(backend):
    """V-JEPA: the mean over mask kinds of the mean absolute difference, whatever the number of tokens of a kind."""
    sizes = (48, 120)
    kinds = [(draw(size, 32, seed=size), draw(size, 32, seed=size + 1)) for size in sizes]
    expected = sum(F.l1_loss(z.double(), F.layer_norm(t.double(), (32,))) for z, t in kinds) / len(kinds)
    weight = torch.cat([torch.full((size,), 1 / (len(sizes) * size)) for size in sizes])
    prediction, target = (torch.cat(tensors) for tensors in zip(*kinds, strict=True))
    loss = latent_loss(prediction, target, beta=0.0, weight=weight)
    assert abs(loss.item() / expected.item() - 1) < 2e-7


def test_large_sums_stay_exact(backend):
    """Two million terms, one part in 1e7: summed in blocks, not one after the other."""
    prediction, target = draw(4096, 512), draw(4096, 512, seed=1)
    exact = F.smooth_l1_loss(prediction.double(), F.layer_norm(target.double(), (512,)))
    assert abs(latent_loss(prediction, target).item() / exact.item() - 1) < 1e-7


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not emulated")
def test_sums_of_more_programs_than_are_read_at_once(monkeypatch):
    from jepa_fast.kernels import latent_loss as kernels
    monkeypatch.setattr(kernels, "BLOCK_P", 4)
    prediction, target = draw(39, 600), draw(39, 600, seed=1)
    with ops.use_backend("triton"):
        loss, stats = latent_loss(prediction, target, return_stats=True)
    normalised = F.layer_norm(target.double(), (600,))
    assert testing.error(loss, F.smooth_l1_loss(prediction.double(), normalised)) < 3e-7
    assert testing.error(stats["cosine"], F.cosine_similarity(prediction.double(), normalised).mean()) < 1e-5


def test_collapsed_target_is_zero_after_normalising(backend):
    """Rows without variance, far from zero, leave no rounding for 1 / std to blow up."""
    prediction, target = draw(9, 45), (1000 * draw(9, 1, seed=1)).repeat(1, 45)
    loss, stats = latent_loss(prediction, target, return_stats=True)
    torch.testing.assert_close(loss, F.smooth_l1_loss(prediction, torch.zeros(9, 45)), rtol=2e-7, atol=0)
    assert stats["target_std"] == 0 and stats["cosine"] == 0


def test_number_of_threads_does_not_matter(backend):
    prediction, target = draw(700, 100).requires_grad_(), draw(700, 100, seed=1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            loss, stats = latent_loss(prediction, target, return_stats=True)
            results.append((loss, torch.autograd.grad(loss, prediction)[0], *stats.values()))
    finally:
        torch.set_num_threads(threads)
    if backend == "cpp":  # PyTorch's own sums depend on it
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_nan_reaches_the_loss(backend, beta):
    prediction, target, target_idx = draw(4, 20), draw(6, 20, seed=1), torch.tensor([5, 0, 0, 2])
    for d in (3, 19):  # in the whole vectors and in the rest
        broken = prediction.clone()
        broken[1, d] = float("nan")
        assert latent_loss(broken, target, target_idx, beta=beta).isnan()
        broken = target.clone()
        broken[[1, 3, 4], d] = float("nan")  # rows that no prediction is compared with
        assert torch.equal(latent_loss(prediction, broken, target_idx, beta=beta),
                           latent_loss(prediction, target, target_idx, beta=beta))
        broken[2, d] = float("inf")
        assert latent_loss(prediction, broken, target_idx, beta=beta).isnan()


def test_gradient_at_equality_is_zero(backend):
    prediction, target = torch.zeros(3, 1, requires_grad=True), draw(3, 1)  # one column normalises to 0
    for beta in (0.0, 1.0):
        (grad,) = torch.autograd.grad(latent_loss(prediction, target, beta=beta), prediction)
        assert torch.equal(grad, torch.zeros(3, 1))


def test_no_rows(backend):
    prediction, target, none = torch.zeros(0, 8, requires_grad=True), draw(5, 8), torch.zeros(0, dtype=torch.int64)
    loss = latent_loss(prediction, target, none)
    assert loss.isnan() and F.smooth_l1_loss(prediction, torch.zeros(0, 8)).isnan()
    assert torch.autograd.grad(loss, prediction)[0].shape == (0, 8)
    assert latent_loss(prediction, target, none, weight=torch.zeros(0)).item() == 0


def test_statistics(backend):
    prediction, target = draw(33, 70).requires_grad_(), 3 * draw(33, 70, seed=1) + 2
    loss, stats = latent_loss(prediction, target, return_stats=True)
    assert torch.equal(loss, latent_loss(prediction, target))
    z, t = prediction.detach().double(), target.double()
    expected = {
        "cosine": F.cosine_similarity(z, F.layer_norm(t, (70,)), dim=1).mean(),
        "prediction_power": (z.norm(dim=1) ** 2 / 70).mean(),
        "target_std": t.std(dim=1, correction=0).mean(),
    }
    assert list(stats) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(stats[name].double(), value, rtol=1e-6, atol=1e-7)
        assert stats[name].shape == () and not stats[name].requires_grad


def test_autocast_does_not_change_the_precision(backend):
    prediction, target = draw(10, 30), draw(10, 30, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = latent_loss(prediction, target)
    assert torch.equal(inside, latent_loss(prediction, target))


def test_second_derivative_is_refused(backend):
    prediction = draw(4, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="latent_loss has no second derivative"):
        torch.autograd.grad(latent_loss(prediction, draw(4, 8, seed=1)), prediction, create_graph=True)


Z, T, IDX = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(4, dtype=torch.int64)
BAD = [
    ((Z.long(), T, IDX), {}, TypeError, "prediction must be floating point, got torch.int64"),
    ((Z, T.long(), IDX), {}, TypeError, "target must be floating point, got torch.int64"),
    ((Z[None], T, IDX), {}, ValueError,
     "prediction must be [P, D] and target [R, D] with one D > 0, got [1, 4, 8] and [6, 8]"),
    ((Z, T[:, :7], IDX), {}, ValueError,
     "prediction must be [P, D] and target [R, D] with one D > 0, got [4, 8] and [6, 7]"),
    ((Z[:, :0], T[:, :0], IDX), {}, ValueError,
     "prediction must be [P, D] and target [R, D] with one D > 0, got [4, 0] and [6, 0]"),
    ((Z, T.clone().requires_grad_(), IDX), {}, ValueError,
     "target must not require grad, got one that does: run the target encoder under torch.no_grad(), or detach() its "
     "output"),
    ((Z, T), {}, ValueError, "target must have the 4 rows of prediction where target_idx is None, got 6"),
    ((Z, T, IDX.int()), {}, ValueError, "target_idx must be [P] = [4] int64, got [4] torch.int32"),
    ((Z, T, IDX[:3]), {}, ValueError, "target_idx must be [P] = [4] int64, got [3] torch.int64"),
    ((Z, T, IDX + 6), {}, IndexError, "target_idx must be in [0, 6), got 6"),
    ((Z, T, IDX - 1), {}, IndexError, "target_idx must be in [0, 6), got -1"),
    ((Z, T, IDX), {"beta": -1.0}, ValueError, "beta and eps must be at least 0, got -1.0 and 1e-05"),
    ((Z, T, IDX), {"eps": -1.0}, ValueError, "beta and eps must be at least 0, got 1.0 and -1.0"),
    ((Z, T, IDX), {"weight": torch.zeros(3)}, ValueError, "weight must be [P] = [4] float32, got [3] torch.float32"),
    ((Z, T, IDX), {"weight": torch.zeros(4).double()}, ValueError,
     "weight must be [P] = [4] float32, got [4] torch.float64"),
    ((Z, T, IDX), {"weight": torch.zeros(4, requires_grad=True)}, ValueError,
     "weight must not require grad, got one that does: gradient reaches prediction only"),
    ((Z, T, IDX.to("meta")), {}, ValueError,
     "prediction, target and target_idx must be on one device, got cpu, cpu, meta"),
]


@pytest.mark.parametrize("arguments, options, kind, message", BAD)
def test_bad_input(arguments, options, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        latent_loss(*arguments, **options)
