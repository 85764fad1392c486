"""float8 products of the target encoder: the emulation against its definition, and where it is refused."""

import dataclasses

import pytest
import torch
from golden_data import error

from jepa_fast.masking import MultiBlock
from jepa_fast.models.encoder import VisionTransformerConfig
from jepa_fast.models.predictor import PredictorConfig
from jepa_fast.nn import fp8
from jepa_fast.objectives.latent_prediction import LatentPredictionConfig
from jepa_fast.optim import Horizon
from jepa_fast.recipes.ijepa import ijepa_mnist
from jepa_fast.recipes.lejepa import lejepa_mnist
from jepa_fast.train.distributed import World
from jepa_fast.train.step import TrainStep, build_optimizer

CPU = World(0, 1, torch.device("cpu"))


def e4m3(x: float) -> float:
    """The nearest number with 3 bits after the point and exponents from -6 to 8, ties to even."""
    if x == 0:
        return 0.0
    exponent = max(torch.tensor(abs(x), dtype=torch.float64).log2().floor().item(), -6)
    unit = 2.0 ** (exponent - 3)
    return round(x / unit) * unit


def test_quantised_rows_are_e4m3_of_rows_scaled_to_448():
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-6, 0.1, 1.0, 50.0, 0.0]).view(5, 1)
    data, scale = fp8.quantize_rows(x)
    assert torch.equal(data.float().abs().amax(1), torch.tensor([448.0] * 4 + [0.0]))
    for row, values, s in zip(x, data, scale, strict=True):
        assert [float(v) for v in values] == [e4m3(float(v / s)) for v in row]
        assert (values.float() * s - row).abs().max() <= row.abs().max() / 28 + 1e-30  # half of 32, the last step below 448


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_product_is_that_of_the_quantised_numbers(dtype, limit):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(7, 48, generator=g).to(dtype)
    weight, bias = torch.randn(32, 48, generator=g), torch.randn(32, generator=g)
    wide = [data.double() * scale.double().unsqueeze(1) for data, scale in map(fp8.quantize_rows, (x, weight))]
    expected = wide[0] @ wide[1].T + bias.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = fp8.Float8Weight.of(weight).linear(x, bias)
    assert out.dtype == dtype and error(out, expected) < limit
    # what float8 costs against the product itself: two roundings of 2^-4 at most each, mostly cancelling
    assert 0.005 < error(out, x.double() @ weight.double().T + bias.double()) < 0.06


def test_emulation_is_what_the_scaled_product_computes():
    """The call that a GPU takes, where PyTorch has it for CPUs."""
    g = torch.Generator().manual_seed(4)
    x, weight = torch.randn(7, 48, generator=g), fp8.Float8Weight.of(torch.randn(32, 48, generator=g))
    for bias in (None, torch.randn(32, generator=g).bfloat16()):
        try:
            theirs = weight._product(*fp8.quantize_rows(x), bias)
        except (RuntimeError, NotImplementedError) as missing:
            pytest.skip(str(missing).splitlines()[0])
        assert theirs.dtype == torch.bfloat16 and error(theirs, weight.linear(x, bias)) < 4e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_product_on_a_gpu():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no tensor cores for float8")
    g = torch.Generator().manual_seed(5)
    x, weight, bias = (torch.randn(shape, generator=g).bfloat16() for shape in ((333, 1280), (5120, 1280), (5120,)))
    expected = fp8.Float8Weight.of(weight).linear(x, bias)
    out = fp8.Float8Weight.of(weight.cuda()).linear(x.cuda(), bias.cuda())
    assert out.dtype == torch.bfloat16 and error(out.cpu(), expected) < 1e-2


def test_bad_numbers_stay_visible():
    for bad in (torch.nan, torch.inf):
        x = torch.randn(3, 16)
        x[1, 5] = bad
        out = fp8.Float8Weight.of(torch.randn(16, 16)).linear(x)
        assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def recipe(**train):
    small = ijepa_mnist()
    objective = LatentPredictionConfig(
        encoder=VisionTransformerConfig(image_size=28, patch_size=4, in_chans=1, embed_dim=32, depth=3, num_heads=2),
        predictor=PredictorConfig(embed_dim=16, depth=1), masking=MultiBlock(min_keep=2, mask_group_size=8))
    return dataclasses.replace(small, objective=objective,
                               train=dataclasses.replace(small.train, batch_size=8, precision="fp32", **train))


def steps(count, **train):
    config = recipe(**train)
    torch.manual_seed(0)
    objective = config.objective.build()
    optimizer = build_optimizer(config, objective)
    step = TrainStep(config, objective, optimizer, Horizon(10, 1, 1.0), CPU)
    g = torch.Generator().manual_seed(2)
    batches = [{"images": torch.randn(8, 1, 28, 28, generator=g), "index": torch.arange(8)} for _ in range(count)]
    return objective, [float(step(batch, i)[0]["loss"]) for i, batch in enumerate(batches)]


def test_training_with_a_float8_target():
    """All products but the last block's are in float8, of weights that follow the average; the loss hardly moves."""
    (_, same), (objective, quantised) = steps(3), steps(3, target_precision="fp8")
    assert all(0 < abs(a / b - 1) < 0.02 for a, b in zip(quantised, same, strict=True))
    target, trained = objective.target_encoder.encoder, objective.encoder
    assert target.blocks[-1].float8 is None and all(block.float8 is None for block in trained.blocks)
    for block in target.blocks[:-1]:
        weights = {block.attn.qkv.weight, block.attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight}
        assert block.float8.keys() == weights
        for weight, ours in block.float8.items():
            data, scale = fp8.quantize_rows(weight)
            assert torch.equal(ours.data.float(), data.float()) and torch.equal(ours.scale, scale)
    # compiled blocks know no float8: these stay with the ops
    images = torch.randn(2, 1, 28, 28)
    expected = target(images).detach()
    for block in target.blocks[:-1]:
        block.fusion = "compile"
    assert torch.equal(target(images).detach(), expected)
    # no trace in what is saved
    assert objective.state_dict().keys() == steps(0)[0].state_dict().keys()


def test_where_it_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="^train.target_precision fp8 is for objectives with a target encoder, got LeJEPA$"):
        config = lejepa_mnist()
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, target_precision="fp8"))
        objective = config.objective.build()
        TrainStep(config, objective, build_optimizer(config, objective), Horizon(10, 1, 1.0), CPU)
    with pytest.raises(ValueError, match="needs whole weights, train.shard_ranks 1, got -1"):
        steps(0, target_precision="fp8", shard_ranks=-1)
    encoder = VisionTransformerConfig(image_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=2)
    with pytest.raises(ValueError, match="multiples of 16, got 24 -> 72 in blocks.0.attn.qkv"):
        fp8.quantize_(encoder.build())
    with pytest.raises(ValueError, match="two transformer blocks or more, got VisionTransformer with 1"):
        fp8.quantize_(dataclasses.replace(encoder, depth=1).build())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match="needs tensor cores of sm_89 or newer, cuda:0 is sm_80"):
        fp8._check_device(torch.device("cuda", 0))
