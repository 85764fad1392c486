"""V-JEPA 2.1 against what the official modules computed, a plain version in float64, and numbers that its files fix."""

import dataclasses

import plain_vjepa21 as plain
import pytest
import torch
from golden_data import assert_moments, error, golden, under

from jepa_fast.checkpoints import load_official, save_official
from jepa_fast.masking import BlockMask, Masks, MultiBlock3D, nearest_target
from jepa_fast.models.video_encoder21 import HierarchicalVideoTransformerConfig
from jepa_fast.models.video_predictor21 import HierarchicalVideoPredictor, HierarchicalVideoPredictorConfig
from jepa_fast.nn.block import Sequences
from jepa_fast.objectives.video_prediction21 import HierarchicalVideoPrediction, HierarchicalVideoPredictionConfig
from jepa_fast.optim import AdamWEMA, param_groups

ENCODER = HierarchicalVideoTransformerConfig(image_size=24, num_frames=4, patch_size=4, embed_dim=32, depth=4, num_heads=2,
                                             levels=(0, 1, 2, 3), native_side=5)
OBJECTIVE = HierarchicalVideoPredictionConfig(
    encoder=ENCODER, predictor=HierarchicalVideoPredictorConfig(embed_dim=24, depth=2, num_heads=2, num_mask_tokens=3),
    masking=MultiBlock3D(mask_group_size=2),
    image_masking=MultiBlock3D(masks=(BlockMask(num_blocks=4),), mask_group_size=3),
    image_share=0.4, context_weight=0.5, image_context_weight=0.3, context_warmup=None)


def build(dtype=torch.float64, **changes) -> HierarchicalVideoPrediction:
    """A tiny model whose parameters all matter: the ones that start at zero or 1e-6 are drawn too."""
    torch.manual_seed(0)
    objective = dataclasses.replace(OBJECTIVE, **changes).build().to(dtype)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return objective


def batch_of(dtype=torch.float64, clips=2, images=3) -> dict:
    """Frames of 6 x 5 tokens and images of 6 x 6: neither is the side that positions are stretched to, 5 x 5."""
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": dtype}
    return {"clips": torch.rand(clips, 3, 4, 24, 20, **draw), "images": torch.rand(images, 3, 24, 24, **draw),
            "index": torch.arange(clips)}


def prepared(objective, batch, step=3, first_sample=0):
    return objective.prepare(batch, seed=5, step=step, first_sample=first_sample)


def weights_of(objective, requires_grad=True) -> dict[str, dict]:
    modules = objective.roles() | {"target_encoder": objective.target_encoder.encoder}
    return {role: {name: p.detach().clone().requires_grad_(requires_grad) for name, p in module.named_parameters()}
            for role, module in modules.items()}


def plain_loss(objective, weights, batch, step=3, scale=1.0) -> dict[str, torch.Tensor]:
    config, losses = objective.config, {}
    for name, sampler, weight in (("images", config.image_masking, config.image_context_weight),
                                  ("clips", config.masking, config.context_weight)):
        if name not in batch:
            continue
        pixels = batch[name].unsqueeze(2) if name == "images" else batch[name]
        masks = sampler.sample(plain.grid_of(pixels[0], config.encoder), len(pixels), seed=5, step=step)
        losses[name] = plain.loss(weights, config, pixels, masks.context_lists(), masks.target_lists(), scale * weight)
    share = config.image_share if len(losses) == 2 else float("images" in losses)
    losses["loss"] = share * losses.get("images", 0) + (1 - share) * losses.get("clips", 0)
    return losses


def official(dtype: torch.dtype, **changes) -> HierarchicalVideoPrediction:
    """The model of the golden file (its README, section 13); loading is strict: our names are the official ones."""
    encoder = HierarchicalVideoTransformerConfig(image_size=80, num_frames=4, embed_dim=32, depth=12, num_heads=2)
    predictor = HierarchicalVideoPredictorConfig(embed_dim=32, depth=4, num_heads=2, num_mask_tokens=2)
    objective = HierarchicalVideoPredictionConfig(encoder=encoder, predictor=predictor, masking=OBJECTIVE.masking,
                                                  image_masking=OBJECTIVE.image_masking, context_warmup=None,
                                                  **changes).build()
    for role, module in (objective.roles() | {"target_encoder": objective.target_encoder.encoder}).items():
        module.load_state_dict(under(golden("vjepa21_model"), f"weights/{role}/backbone."))
    return objective.to(dtype)


def official_groups(objective, dtype) -> dict[str, dict]:
    """A batch of clips alone and one of images alone, with the masks of the file."""
    groups = {}
    for kind, num_tokens in (("clips", 50), ("images", 25)):
        inputs = under(golden("vjepa21_model"), f"input/{kind}/")
        lists = ([inputs[f"{name}{i}"] for i in range(len(inputs) // 2)] for name in ("context", "target"))
        masks = Masks.from_lists(*lists, num_tokens, is_paired=True)
        pixels = golden("vjepa21_model")[f"input/{kind}"].to(dtype)
        groups[kind] = {"groups": [objective.group(pixels, masks)]}
    return groups


@pytest.mark.parametrize("dtype, prefix, limit", [(torch.float32, "", 2e-6), (torch.float64, "f64/", 1e-10)],
                         ids=["float32", "float64"])
def test_forward_equals_the_official_modules(dtype, prefix, limit):
    data, objective, unweighted = golden("vjepa21_model"), official(dtype), official(dtype, weight_by_distance=False)
    for kind, batch in official_groups(objective, dtype).items():
        out, group = objective(batch), batch["groups"][0]
        for name, ours in (("prediction_loss", out["prediction_loss"]), ("context_loss", out["context_term"] / 0.5)):
            assert abs(float(ours.detach() / data[f"{prefix}train/{kind}/{name}"]) - 1) < limit, (kind, name)
        context = unweighted(official_groups(unweighted, dtype)[kind])["context_term"] / 0.5
        assert abs(float(context.detach() / data[f"{prefix}train/{kind}/context_loss_unweighted"]) - 1) < limit
        final = objective.target_encoder(group.pixels)
        assert error(final, data[f"{prefix}out/{kind}/encoder_output"]) < max(limit, 5e-6 if not prefix else 0)
        rows = [data[f"out/{kind}/distance{i}"].flatten() for i in range(2 if kind == "clips" else 1)]
        assert error(1 / group.nearness, torch.cat(rows)) < 1e-6
        if prefix:
            predictions, contexts = objective.predict([group], group.masks)
            kinds = [len(part) for part in rows]
            for i, part in enumerate(torch.cat(contexts[0], 1).split(kinds)):
                assert_moments(part, data[f"f64/out/{kind}/context_prediction{i}"], limit, f"{kind} {i}")
            assert_moments(torch.cat(predictions[0], 1), sum(
                data[f"f64/out/{kind}/prediction{i}"] for i in range(len(rows))), limit, kind)


def test_gradients_equal_the_official_modules():
    """Of half the loss of the images and half that of the clips, as a step of as many ranks of either has."""
    data, objective = golden("vjepa21_model"), official(torch.float64)
    batch = {"groups": [batch["groups"][0] for batch in official_groups(objective, torch.float64).values()]}
    objective(batch)["loss"].backward()
    gradients = {f"f64/grad/{role}/backbone.{name}": p.grad for role, module in objective.roles().items()
                 for name, p in module.named_parameters() if p.grad is not None}
    assert gradients.keys() == {name for name in data if name.startswith("f64/grad/")}
    for name, gradient in gradients.items():
        assert_moments(gradient, data[name], 1e-10, name)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("parts", [("clips", "images"), ("clips",), ("images",)], ids="+".join)
def test_loss_and_gradients_equal_the_plain_version(parts, weighted):
    objective = build(weight_by_distance=weighted)
    batch = {name: value for name, value in batch_of().items() if name in (*parts, "index")}
    ours = objective(prepared(objective, batch))
    ours["loss"].backward()
    weights = weights_of(objective)
    expected = plain_loss(objective, weights, batch)
    expected["loss"].backward()
    assert abs(float(ours["loss"].detach() / expected["loss"].detach()) - 1) < 1e-12
    for name in parts:
        assert abs(float(ours[f"loss_{name}"].detach() / expected[name].detach()) - 1) < 1e-12
    checked = 0
    for role, module in objective.roles().items():
        for name, parameter in module.named_parameters():
            other = weights[role][name].grad
            assert (parameter.grad is None) == (other is None), name
            if other is not None:
                assert (parameter.grad - other).abs().max() <= 1e-12 + 1e-9 * other.abs().max(), (role, name)
                checked += 1
    assert checked > 80


def test_mixed_batch_equals_separate_passes():
    """Clips of two lengths and images in one packed pass: loss and gradient are those of one pass each, weighted."""
    objective, batch = build(), batch_of()
    longer = torch.rand(2, 3, 6, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    batch["clips"] = [batch["clips"], longer]
    whole = objective(prepared(objective, batch))["loss"]
    names = [name for name, p in objective.named_parameters() if p.requires_grad]
    parameters = [p for p in objective.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(whole, parameters)
    pieces = [({"clips": clips}, 0.3) for clips in batch["clips"]] + [({"images": batch["images"]}, 0.4)]
    total, sums = 0.0, [torch.zeros_like(p) for p in parameters]
    for piece, share in pieces:
        loss = objective(prepared(objective, piece))["loss"] * share
        total += float(loss.detach())
        for out, gradient in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            out += 0 if gradient is None else gradient
    assert abs(float(whole.detach()) / total - 1) < 1e-13
    for name, ours, separate in zip(names, gradients, sums, strict=True):
        assert (ours - separate).abs().max() <= 1e-13 + 1e-11 * separate.abs().max(), name


def test_context_loss_is_skipped_while_lambda_is_zero():
    """The same loss and gradients as with an infinitesimal lambda, and zeros for the head that did not run."""
    objective, batch = build(context_warmup=(15, 30)), batch_of()
    ours = objective(prepared(objective, batch, step=14))
    assert float(ours["context_term"].detach()) == 0.0 and float(ours["loss"].detach()) == pytest.approx(
        float(plain_loss(objective, weights_of(objective), batch, step=14, scale=0.0)["loss"].detach()), rel=1e-12)
    parameters = dict(objective.named_parameters())
    ours["loss"].backward()
    skipped = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    for name in ("weight", "bias"):
        assert not parameters[f"predictor.predictor_proj_context.{name}"].grad.any()
    objective.zero_grad(set_to_none=True)
    with_branch = build(context_warmup=(13, 10**15))
    with_branch(prepared(with_branch, batch, step=14))["loss"].backward()
    for name, p in with_branch.named_parameters():
        assert (p.grad is None) == (name not in skipped), name
        assert p.grad is None or (p.grad - skipped[name]).abs().max() < 1e-12, name


def test_idle_head_decays_and_unused_mask_tokens_do_not():
    objective = build(torch.float32, context_warmup=(15, 30))
    optimizer = AdamWEMA(param_groups(objective.roles(), 0.1), lr=0.01)
    head, tokens = objective.predictor.predictor_proj_context, list(objective.predictor.mask_tokens)
    before = head.weight.detach().clone(), head.bias.detach().clone(), tokens[1].detach().clone()
    objective(prepared(objective, batch_of(torch.float32)))["loss"].backward()
    optimizer.step()
    assert error(head.weight, before[0] * (1 - 0.01 * 0.1)) < 1e-6 and torch.equal(head.bias, before[1])
    assert optimizer.state[head.weight]["step"] == 1
    assert torch.equal(tokens[1], before[2]) and not optimizer.state[tokens[1]]


def test_warmup_of_lambda():
    config = HierarchicalVideoPredictionConfig()
    values = {step: config.context_weight * config.warmup(step) for step in (0, 14_999, 15_000, 22_500, 30_000, 10**6)}
    assert values == {0: 0, 14_999: 0, 15_000: 0, 22_500: 0.25, 30_000: 0.5, 10**6: 0.5}
    assert dataclasses.replace(config, context_warmup=None).warmup(0) == 1.0


@pytest.mark.parametrize("grid, sampler", [
    ((2, 6, 6), MultiBlock3D(mask_group_size=2)), ((1, 16, 16), OBJECTIVE.image_masking),
    ((3, 5, 9), MultiBlock3D(mode="unbiased")), ((8, 16, 16), MultiBlock3D())])
def test_distances_equal_brute_force(grid, sampler):
    num_samples = 1 if grid[0] == 8 else 3
    masks = sampler.sample(grid, num_samples, seed=0, step=1)
    ours = nearest_target(masks, grid)
    place = plain.places(grid)
    contexts = masks.context_idx.split(masks.context_lengths.flatten().tolist())
    targets = masks.target_idx.split(masks.target_lengths.flatten().tolist())
    expected = [(place[c].unsqueeze(1) - place[t]).square().sum(-1).min(1)[0]
                for c, t in zip(contexts, targets, strict=True)]
    assert ours.dtype == torch.int64 and torch.equal(ours, torch.cat(expected)) and int(ours.min()) >= 1


def test_distance_weights_of_the_specification():
    """A neighbour of a target counts 1, a token at distance 4 half; lists of one token, at the far end of the grid."""
    masks = Masks.from_lists([torch.tensor([[1, 4, 5 * 7]])], [torch.tensor([[0]])], 3 * 5 * 7, is_paired=True)
    assert nearest_target(masks, (3, 5, 7)).double().pow(-0.25).tolist() == [1.0, 0.5, 1.0]
    masks = Masks.from_lists([torch.tensor([[0]])], [torch.tensor([[104]])], 105, is_paired=True)
    assert nearest_target(masks, (3, 5, 7)).tolist() == [4 + 16 + 36]


def test_distance_mistakes_are_named():
    lists = {"context": [torch.tensor([[1]])], "target": [torch.tensor([[0]])], "num_tokens": 8}
    with pytest.raises(ValueError, match="every context list paired with its own target list"):
        nearest_target(Masks.from_lists(**lists), (2, 2, 2))
    with pytest.raises(ValueError, match=r"grid must have the 8 tokens of the masks, got \(2, 2, 3\)"):
        nearest_target(Masks.from_lists(**lists, is_paired=True), (2, 2, 3))
    empty = lists | {"target": [torch.empty(1, 0, dtype=torch.int64)]}
    with pytest.raises(ValueError, match="every target list must hold a token"):
        nearest_target(Masks.from_lists(**empty, is_paired=True), (2, 2, 2))


def test_rotary_is_a_rotation_of_differences():
    """Pairs keep their norm; q . k depends on the difference of positions alone, axis by axis; ends meet the native side."""
    encoder = ENCODER.build()
    table = encoder.rotary((3, 5, 5))  # at the native side positions are whole
    assert error(table.square().sum(1), torch.ones(75, 12)) < 1e-6
    wide = encoder.rotary((3, 9, 17)).view(3, 9, 17, 2, -1)
    native = table.view(3, 5, 5, 2, -1)
    for row, other_row in ((0, 0), (8, 4)):
        for column, other_column in ((0, 0), (16, 4)):
            assert error(wide[:, row, column], native[:, other_row, other_column]) < 1e-5
    q, k = torch.randn(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([(t, h, w) for t in range(3) for h in range(5) for w in range(5)])
    turned = plain_turn(torch.stack([q, k]), encoder.double().rotary((3, 5, 5)))
    products = turned[0] @ turned[1].T
    difference = positions.unsqueeze(1) - positions
    for first, second in ((0, 31), (62, 7), (74, 40)):
        same = (difference == difference[first, second]).all(-1)
        assert same.sum() > 1 and error(products[same], products[first, second].expand(int(same.sum()))) < 1e-12


def plain_turn(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """[2, R] at every position of the table: [2, N, R], by the definition of `varlen_attention`."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x.unsqueeze(1) * table[:, 0] + swapped.unsqueeze(1) * table[:, 1]


def test_levels_and_outputs_of_the_encoder():
    encoder = build().encoder
    clips = batch_of()["clips"]
    weights = {name: p.detach() for name, p in encoder.named_parameters()}
    for pixels in (clips, batch_of()["images"], torch.rand(1, 3, 4, 20, 28, dtype=torch.float64)):
        as_clips = pixels if pixels.dim() == 5 else pixels.unsqueeze(2)
        expected = [torch.stack(level) for level in zip(*(plain.encode(weights, ENCODER, s) for s in as_clips), strict=True)]
        assert error(encoder(pixels), expected[-1]) < 1e-12
        for ours, value in zip(encoder.layers(pixels, (1, 3)), (expected[1], expected[3]), strict=True):
            assert error(ours, value) < 1e-12
    images = batch_of()["images"]
    assert torch.equal(encoder.frames(images), encoder(images.unsqueeze(2)))
    tokens, grid = encoder.patch_features(images)
    assert grid == (1, 6, 6) and tokens.shape == (3, 36, 32) and torch.equal(encoder.features(images), tokens.mean(1))


def test_bfloat16_is_the_same_loss():
    """Under autocast the loss and what it is made of are those of float32 to the precision of bfloat16."""
    objective, batch = build(torch.float32), batch_of(torch.float32)
    exact = objective(prepared(objective, batch))
    with torch.autocast("cpu", torch.bfloat16):
        ours = objective(prepared(objective, batch))
    for name in ("loss", "prediction_loss", "context_term", "loss_clips", "loss_images"):
        assert ours[name].dtype == torch.float32
        assert abs(float(ours[name].detach() / exact[name].detach()) - 1) < 1e-2, name


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_training_reduces_the_loss(autocast):
    objective, batch = build(torch.float32), batch_of(torch.float32)
    optimizer = AdamWEMA(param_groups(objective.roles(), 0.04), lr=3e-3, averages=objective.averages())
    optimizer.momentum, losses = 0.99, []
    for _ in range(25):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = objective(prepared(objective, batch))["loss"]
        assert loss.dtype == torch.float32
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


# of section 2 of the paper's models; what is counted: both stems, embeddings of the modality, norms of four levels
SIZES = {"B": (768, 12, 12, 4.0, (2, 5, 8, 11), 86.8, 12, 26.3), "L": (1024, 24, 16, 4.0, (5, 11, 17, 23), 304.7, 24, 50.3),
         "g": (1408, 40, 22, 48 / 11, (9, 19, 29, 39), 1013.3, 24, 55.4),
         "G": (1664, 48, 26, 64 / 13, (11, 23, 37, 47), 1845.2, 24, 59.4)}


def models(size: str, predictor_depth: int | None = None, **predictor):
    D, depth, heads, ratio, levels, _, own_depth, _ = SIZES[size]
    config = HierarchicalVideoTransformerConfig(embed_dim=D, depth=depth, num_heads=heads, mlp_ratio=ratio, levels=levels)
    with torch.device("meta"):
        return config.build(), HierarchicalVideoPredictor(
            HierarchicalVideoPredictorConfig(depth=predictor_depth or own_depth, **predictor), config)


def millions(module) -> float:
    return round(sum(p.numel() for p in module.parameters()) / 1e6, 1)


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    encoder, predictor = models(size)
    assert (millions(encoder), millions(predictor)) == (SIZES[size][5], SIZES[size][7])


def test_parameter_counts_of_other_predictors():
    assert millions(models("L", 12)[1]) == 29.0
    # the released distilled ones: one level, a teacher of width 1664, 8 mask tokens
    distilled = {"num_levels": 1, "target_dim": 1664, "num_mask_tokens": 8}
    assert [millions(models(size, 12, **distilled)[1]) for size in "BL"] == [22.9, 23.0]
    assert models("G")[0].blocks[0].mlp.fc1.out_features == 8192 and models("g")[0].blocks[0].mlp.fc1.out_features == 6144


def test_distilled_predictor_runs():
    """One level in, one level of another width out."""
    torch.manual_seed(0)
    predictor = HierarchicalVideoPredictor(
        dataclasses.replace(OBJECTIVE.predictor, num_levels=1, target_dim=40), ENCODER).double()
    assert isinstance(predictor.predictor_embed, torch.nn.Linear) and predictor.predictor_embed.in_features == 32
    masks = OBJECTIVE.masking.sample((2, 6, 6), 2, seed=0, step=0).pack()
    context = torch.randn(len(masks.context_idx), 32, dtype=torch.float64)
    rows, contexts = predictor([context], masks, [(2, 6, 6)], [False], [len(context)], True)
    only_rows, nothing = predictor([context], masks, [(2, 6, 6)], [False], [len(context)], False)
    assert nothing is None and error(only_rows, rows.detach()) < 1e-13
    assert [part.shape for part in predictor.project(contexts, predictor.predictor_proj_context)] == [(len(contexts), 40)]


def test_official_names_and_order():
    encoder, predictor = models("B")
    block = [f"{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for kind in ("weight", "bias")]
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    assert list(shapes) == ["img_mod_embed", "video_mod_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
                            "patch_embed_img.proj.weight", "patch_embed_img.proj.bias",
                            *(f"blocks.{i}.{name}" for i in range(12) for name in block),
                            *(f"norms_block.{i}.{kind}" for i in range(4) for kind in ("weight", "bias"))]
    assert shapes["patch_embed.proj.weight"] == (768, 3, 2, 16, 16) and shapes["img_mod_embed"] == (1, 1, 768)
    assert shapes["patch_embed_img.proj.weight"] == (768, 3, 1, 16, 16)
    assert list(predictor.state_dict()) == [
        "video_mod_embed", "img_mod_embed", *(f"predictor_embed.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
        *(f"mask_tokens.{i}" for i in range(6)), *(f"predictor_blocks.{i}.{name}" for i in range(12) for name in block),
        *(f"{name}.{kind}" for name in ("predictor_norm", "predictor_proj", "predictor_proj_context")
          for kind in ("weight", "bias"))]


def test_official_files_carry_the_whole_objective(tmp_path):
    """Written, read into another model, and trained on: parameters, averages and the state of the optimizer."""
    batch, states = batch_of(torch.float32), []
    objective, other = build(torch.float32), dataclasses.replace(OBJECTIVE).build()

    def optimizer_of(model):
        optimizer = AdamWEMA(param_groups(model.roles(), 0.04), lr=1e-3, averages=model.averages())
        optimizer.momentum = 0.9
        return optimizer

    def step(model, optimizer):
        model(prepared(model, batch))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    optimizer = optimizer_of(objective)
    step(objective, optimizer)
    save_official(tmp_path / "latest.pth.tar", objective, optimizer, epoch=7)
    names = torch.load(tmp_path / "latest.pth.tar")["encoder"]
    assert "module.backbone.norms_block.3.weight" in names and "module.backbone.patch_embed_img.proj.bias" in names
    other_optimizer = optimizer_of(other)
    assert load_official(tmp_path / "latest.pth.tar", other, other_optimizer)["epoch"] == 7
    for model, own in ((objective, optimizer), (other, other_optimizer)):
        step(model, own)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_initialisation():
    torch.manual_seed(0)
    config = dataclasses.replace(ENCODER, embed_dim=128, num_heads=2)
    encoder = config.build()
    predictor = HierarchicalVideoPredictor(HierarchicalVideoPredictorConfig(embed_dim=96, depth=3, num_heads=4), config)

    def deviation(parameter) -> float:
        return float(parameter.detach().double().std())

    for number, block in enumerate([*encoder.blocks, *predictor.predictor_blocks]):
        depth = 1 + (number if number < 4 else number - 4)
        for name, scale in (("attn.qkv", 1.0), ("mlp.fc1", 1.0), ("attn.proj", (2 * depth) ** -0.5),
                            ("mlp.fc2", (2 * depth) ** -0.5)):
            assert deviation(block.get_parameter(f"{name}.weight")) == pytest.approx(0.02 * scale, rel=0.05)
    for weight in (encoder.patch_embed.proj.weight, encoder.patch_embed_img.proj.weight, predictor.predictor_embed[0].weight,
                   predictor.predictor_embed[2].weight, predictor.predictor_proj.weight,
                   predictor.predictor_proj_context.weight):
        assert deviation(weight) == pytest.approx(0.02, rel=0.05)
    for embed in (encoder.img_mod_embed, encoder.video_mod_embed, predictor.img_mod_embed, predictor.video_mod_embed):
        assert deviation(embed) == pytest.approx(1e-6, rel=0.3)
    assert not any(token.any() for token in predictor.mask_tokens)
    assert all((norm.weight == 1).all() and not norm.bias.any() for norm in encoder.norms_block)


def test_token_counts_of_a_step():
    """ViT-L before the cool-down, of the ranks that see clips and the ones that see images."""
    clips, images = MultiBlock3D(mask_group_size=48), OBJECTIVE.image_masking
    images = dataclasses.replace(images, masks=(BlockMask(num_blocks=10),), mask_group_size=72)
    counts = torch.zeros(2, 2)
    for step in range(20):
        for row, (sampler, grid, size) in enumerate(((clips, (8, 16, 16), 48), (images, (1, 16, 16), 72))):
            masks = sampler.sample(grid, size, seed=0, step=step).pack()
            counts[row] += torch.tensor([len(masks.context_idx), len(masks.predictor_idx)]) / 20
    expected = torch.tensor([[27.2e3, 140e3], [3.0e3, 12.2e3]])
    # the mean of 20 steps, whose deviation is that of a few block sizes
    assert ((counts / expected - 1).abs() < 0.1).all(), counts


@pytest.mark.parametrize("change, message", [
    ({"levels": (0, 1, 2)}, r"the last one depth - 1 = 3, got \(0, 1, 2\)"),
    ({"levels": (1, 0, 3)}, "levels must be numbers of blocks in rising order"),
    ({"native_side": None}, "native_side must be given for patches that are not 14 or 16 pixels, got patch_size 4"),
    ({"image_size": 30}, "image_size must be a multiple of patch_size, got 30 and 4"),
    ({"num_frames": 3}, "num_frames must be a multiple of tubelet_size, got 3 and 2"),
    ({"num_heads": 5}, "embed_dim must be a multiple of num_heads, got 32 and 5")])
def test_bad_encoders_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ENCODER, **change)


@pytest.mark.parametrize("change, message", [
    ({"image_share": 1.5}, r"image_share must be in \[0, 1\], got 1.5"),
    ({"context_weight": -1.0}, "context_weight must be at least 0, got -1"),
    ({"context_warmup": (5, 5)}, r"context_warmup must be two steps in rising order, got \(5, 5\)"),
    ({"predictor": HierarchicalVideoPredictorConfig(target_dim=1664)}, "target_dim must be the encoder's width 32")])
def test_bad_objectives_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OBJECTIVE, **change)


def test_bad_input_is_named():
    objective = build()
    encoder = objective.encoder
    with pytest.raises(ValueError, match=r"a grid must have two rows and columns or more to be stretched, got \(2, 1, 6\)"):
        encoder(torch.zeros(1, 3, 4, 4, 24, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"multiples of 2 frames and 4 x 4 pixels, got \[1, 3, 3, 24, 24\]"):
        encoder(torch.zeros(1, 3, 3, 24, 24))
    with pytest.raises(ValueError, match=r"pixels must be clips .* or images .*, got \[3, 24\]"):
        encoder(torch.zeros(3, 24))
    with pytest.raises(ValueError, match=r"out_layers must be some of the levels \(0, 1, 2, 3\), got \(1, 4\)"):
        encoder.layers(batch_of()["clips"], (1, 4))
    with pytest.raises(ValueError, match="a batch must hold clips, images or both, got views, index"):
        prepared(objective, {"views": None, "index": None})
    with pytest.raises(ValueError, match=r"predictor.num_levels must be in \[1, 4\], got 5"):
        build(predictor=dataclasses.replace(OBJECTIVE.predictor, num_levels=5))
    with pytest.raises(ValueError, match="num_mask_tokens must be at least 1, got 0"):
        HierarchicalVideoPredictorConfig(num_mask_tokens=0)


def test_masks_do_not_depend_on_how_a_batch_is_split():
    """Rank 1 of two has the second halves of the global clips and images, and their masks."""
    objective, batch = build(), batch_of(clips=4, images=6)
    whole = prepared(objective, batch)["groups"]
    half = {"clips": batch["clips"][2:], "images": batch["images"][3:], "index": batch["index"][2:]}
    second = prepared(objective, half, first_sample=2)["groups"]
    for all_of, own, first in zip(whole, second, (2, 3), strict=True):
        N, B = all_of.masks.num_tokens, all_of.masks.batch_size
        numbers = all_of.masks.context_idx[all_of.masks.context_idx % (B * N) >= first * N] - first * N
        assert torch.equal(numbers, own.masks.context_idx)


def test_packed_context_needs_no_other_tokens():
    """What the encoder makes of visible tokens does not depend on hidden pixels."""
    objective, batch = build(), batch_of()
    group = prepared(objective, batch)["groups"][0]
    rows = group.masks.context_idx
    sequences = (group.masks.context_cu_seqlens, group.masks.context_max_seqlen)
    x, rotary = objective.encoder.embed(batch["clips"], rows)
    full, _ = objective.encoder.embed(batch["clips"])
    assert torch.equal(x, full[rows])
    assert objective.encoder.encode(x, Sequences(*sequences, rotary), (3,))[0].shape == (len(rows), 32)
