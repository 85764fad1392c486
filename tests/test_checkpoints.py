"""Checkpoints of others, read: what a file is, what of it goes into a module, and what is said where it does not fit."""

import pytest
import test_ac
import test_ijepa
import test_vjepa
import test_vjepa21
import torch
from golden_data import config, error, golden, under
from official_files import FRAMES, HEADS, PATCH, SIDE, D, official_file, roles
from torch import nn

from jepa_fast import recipes
from jepa_fast.checkpoints import (
    infer_config,
    load_checkpoint,
    load_encoder,
    load_official,
    official,
    read,
    released,
    save_official,
)
from jepa_fast.checkpoints._names import folded, strip
from jepa_fast.models.ac_predictor import ACPredictor, ACPredictorConfig
from jepa_fast.models.encoder import VisionTransformerConfig
from jepa_fast.models.video_encoder import VideoTransformerConfig
from jepa_fast.models.video_predictor import VideoPredictor, VideoPredictorConfig
from jepa_fast.models.video_predictor21 import HierarchicalVideoPredictor, HierarchicalVideoPredictorConfig
from jepa_fast.optim import AdamWEMA, param_groups

FAMILIES = ("ijepa", "vjepa", "vjepa2", "vjepa2_ac", "vjepa2_1")
VIDEO = dict(image_size=SIDE * PATCH, num_frames=FRAMES, patch_size=PATCH, embed_dim=D, depth=2, num_heads=HEADS)


def saved(tmp_path, file: dict, name: str = "file.pt"):
    torch.save(file, tmp_path / name)
    return tmp_path / name


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_each_generation_is_recognised_and_written_back(family, tmp_path):
    file = official_file(family)
    found = read(saved(tmp_path, file))
    assert (found.format, found.family) == ("official", family)
    for role, state in roles(family).items():
        assert_equal(found.roles[role], state)
    assert found.other["epoch"] == 3 and found.other["world_size"] == 8
    scalars = {key: found.other[key] for key in official.SCALARS}
    again = official.pack(found.roles, family, found.other["opt"], **scalars)
    assert again.keys() == file.keys()
    for role in ("encoder", "predictor", "target_encoder"):
        assert list(again[role]) == list(file[role])
        assert_equal(again[role], file[role])


def test_released_files_of_v_jepa_2_hold_a_table_that_is_not_used(tmp_path):
    path = saved(tmp_path, official_file("vjepa2", with_table=True, num_mask_tokens=10))
    assert read(path).family == "vjepa2"
    encoder = VideoTransformerConfig(**VIDEO, positions="rotary").build()
    report = load_checkpoint(path, encoder)
    assert list(report.ignored) == ["pos_embed"] and not report.missing and len(report.loaded) == len(encoder.state_dict())
    assert "blocks.0-1.attn.qkv.weight" in str(report)
    assert "ignored pos_embed: [1, 32, 48], positions are rotary" in str(report)
    theirs = roles("vjepa2", True)["target_encoder"]
    assert_equal(encoder.state_dict(), {name: theirs[name] for name in theirs if name != "pos_embed"})
    # the same table is an error where the model has none and the file is V-JEPA's
    path = saved(tmp_path, official_file("vjepa"))
    with pytest.raises(ValueError, match=r"target_encoder pos_embed is \[1, 32, 48\] in the file and absent in the model"):
        load_checkpoint(path, encoder)


def test_an_encoder_alone_with_a_table_needs_the_family(tmp_path):
    path = saved(tmp_path, {"target_encoder": official_file("vjepa")["target_encoder"]})
    with pytest.raises(ValueError, match="pass family='vjepa' or 'vjepa2'"):
        read(path)
    assert load_encoder(path, family="vjepa", num_heads=HEADS).config.positions == "sincos"
    assert load_encoder(path, family="vjepa2", num_heads=HEADS).config.positions == "rotary"
    with pytest.raises(ValueError, match="family must be one of ijepa, .*, got 'jepa'"):
        read(path, family="jepa")


def test_mask_tokens_change_in_number_only_where_asked(tmp_path):
    path = saved(tmp_path, official_file("vjepa2", num_mask_tokens=4))
    encoder = VideoTransformerConfig(**VIDEO, positions="rotary")

    def predictor(count: int) -> nn.Module:
        return VideoPredictor(VideoPredictorConfig(embed_dim=24, depth=2, num_mask_tokens=count), encoder)

    with pytest.raises(ValueError, match=r"mask_tokens\.2 is \[1, 1, 24\] in the file and absent in the model; 1 more"):
        load_checkpoint(path, predictor(2), "predictor")
    with pytest.raises(ValueError, match=r"mask_tokens\.4 is absent in the file"):
        load_checkpoint(path, predictor(6), "predictor")
    fewer, more = predictor(2), predictor(6)
    report = load_checkpoint(path, fewer, "predictor", resize_mask_tokens=True)
    assert list(report.ignored) == ["mask_tokens.2", "mask_tokens.3"]
    report = load_checkpoint(path, more, "predictor", resize_mask_tokens=True)
    assert list(report.missing) == ["mask_tokens.4", "mask_tokens.5"]
    theirs = roles("vjepa2")["predictor"]
    assert all(torch.equal(fewer.mask_tokens[j], theirs[f"mask_tokens.{j}"]) for j in range(2))
    assert all(torch.equal(more.mask_tokens[j], theirs[f"mask_tokens.{j}"]) for j in range(4))
    assert not more.mask_tokens[4].any()


@pytest.mark.parametrize("name, family", [("vjepa_model", "vjepa"), ("vjepa2_model_a", "vjepa2")])
def test_encoders_from_files_alone_compute_what_the_official_ones_do(name, family, tmp_path):
    """Golden weights in an official file; the encoder is built from the file without a config."""
    data = golden(name)
    file = {role: {f"module.{key}": value for key, value in under(data, f"weights/{role}/").items()}
            for role in ("encoder", "predictor", "target_encoder")}
    path = saved(tmp_path, file)
    encoder = load_encoder(path, num_heads=config(name)["encoder"]["num_heads"])
    assert read(path).family == family
    assert error(encoder(data["input/step1/pixels"]), data["out/target_full"]) < 5e-6
    if family == "vjepa":  # 75 tokens: 3 time steps of 5 x 5, told by the table
        assert encoder.config.grid == (3, 5, 5)


def test_i_jepa_encoder_from_a_file_alone(tmp_path):
    path = saved(tmp_path, official_file("ijepa"), "IN1K.pth.tar")
    encoder = load_encoder(path, "encoder", num_heads=HEADS)
    assert (encoder.config.image_size, encoder.config.patch_size, encoder.config.depth) == (32, 8, 2)
    assert_equal(encoder.state_dict(), roles("ijepa")["encoder"])
    with pytest.raises(ValueError, match="no official model is 48 wide: pass num_heads"):
        load_encoder(path)


def test_v_jepa_2_1_and_action_conditioned_files(tmp_path):
    """Levels are the official ones of the depth unless given; predictors load strictly, as the official code does."""
    path = saved(tmp_path, official_file("vjepa2_1", num_mask_tokens=8))
    given = dict(num_heads=HEADS, native_side=4)
    with pytest.raises(ValueError, match="no official model of 4 blocks has 4 levels: pass levels"):
        load_encoder(path, **given)
    encoder = load_encoder(path, levels=(0, 1, 2, 3), **given)
    assert_equal(encoder.state_dict(), roles("vjepa2_1")["target_encoder"])
    predictor = HierarchicalVideoPredictor(HierarchicalVideoPredictorConfig(embed_dim=24, depth=2, num_heads=2,
                                                                           num_mask_tokens=8), encoder.config)
    load_checkpoint(path, predictor, "predictor")
    assert_equal(predictor.state_dict(), roles("vjepa2_1", num_mask_tokens=8)["predictor"])
    one = {name: value for name, value in encoder.state_dict().items() if name[:13] not in
           ("norms_block.1", "norms_block.2", "norms_block.3")}
    assert infer_config(one, "vjepa2_1", HEADS)["levels"] == (3,)
    path = saved(tmp_path, official_file("vjepa2_ac"))
    assert load_encoder(path, "encoder", num_heads=HEADS).config.positions == "rotary"
    predictor = ACPredictor(ACPredictorConfig(embed_dim=24, depth=2, num_heads=2), D, (SIDE, SIDE))
    load_checkpoint(path, predictor, "predictor")
    assert_equal(predictor.state_dict(), roles("vjepa2_ac")["predictor"])


@pytest.mark.parametrize("name, family", [
    ("ijepa_vith14", "ijepa"), ("ijepa_vitg16_in22k", "ijepa"), ("vjepa2_vitl16", "vjepa2"),
    ("vjepa2_vitg16_384_cooldown", "vjepa2"), ("vjepa2_1_vitb16", "vjepa2_1"), ("vjepa2_1_vitG16", "vjepa2_1"),
    ("vjepa2_ac_vitg", "vjepa2_ac")])
def test_configs_of_official_sizes_are_read_off_the_tensors(name, family):
    """The recipe's model, of which the file tells shapes alone."""
    with torch.device("meta"):
        objective = recipes.get_recipe(name).objective.build()
    roles = official.roles_of(objective.state_dict())
    assert official.family_of(roles) == family
    fields, config = infer_config(roles["encoder"], family), objective.config.encoder
    assert {"num_heads", "depth", "patch_size"} < fields.keys()
    assert {field: getattr(config, field) for field in fields} == fields


def test_wrappers_at_any_depth_and_roles_asked_for(tmp_path):
    bare = roles("ijepa")["encoder"]
    wrapped = {"module._orig_mod." + name.replace("blocks.0.", "blocks.0._orig_mod._fsdp_wrapped_module."): value
               for name, value in bare.items()}
    assert_equal(strip(wrapped), bare)
    with pytest.raises(ValueError, match="two tensors are named norm.weight"):
        strip({"module.norm.weight": bare["norm.weight"], "norm.weight": bare["norm.weight"]})
    path = saved(tmp_path, {"ema_encoder": wrapped})
    with pytest.raises(ValueError, match="has no target_encoder; it holds ema_encoder"):
        load_encoder(path, num_heads=HEADS)
    assert_equal(load_encoder(path, "ema_encoder", num_heads=HEADS).state_dict(), bare)
    names = [f"blocks.{i}.norm1.bias" for i in (0, 1, 2, 4)]
    assert folded([*names, "norm.bias"]) == ["blocks.0-2,4.norm1.bias", "norm.bias"]


def test_what_is_not_a_checkpoint_is_said(tmp_path):
    for file, message in (({"model": 1, "args": 2}, "holds model, args; expected an official I-JEPA"),
                          ([1, 2], "holds a list; expected an official I-JEPA"),
                          ({"fc.weight": torch.zeros(1)}, "holds tensors named fc.weight")):
        with pytest.raises(ValueError, match=message):
            read(saved(tmp_path, file))
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "broken.safetensors").write_bytes(b"123")
    for name in ("empty.pt", "broken.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is not a readable"):
            read(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="holds nothing; expected an official"):
        read(tmp_path / "folder")
    with pytest.raises(ValueError, match="no file or folder"):
        read(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="ViT-L/16, 64 frames, 256 pixels.* https://dl.fbaipublicfiles.com/vjepa2/vitl.pt"):
        read(tmp_path / "vitl.pt")


def test_released_files_have_public_addresses():
    files = released()
    assert all(file.url.startswith("https://dl.fbaipublicfiles.com/") and file.url.endswith(name)
               for name, file in files.items())
    assert files["vjepa2_1_vitl_dist_vitG_384.pt"].encoder == "ema_encoder"
    assert files["vitg.pt"].encoder == "target_encoder" and {file.family for file in files.values()} == set(FAMILIES)


def trained(seed: int, family: str = "ijepa"):
    """An objective and its optimizer after a step, every parameter away from its start."""
    if family == "vjepa2_1":
        objective = test_vjepa21.build(torch.float32)
        batch = objective.prepare(test_vjepa21.batch_of(torch.float32), seed=0, step=0, first_sample=0)
    elif family == "vjepa2_ac":
        objective, batch = test_ac.build("ac_model"), test_ac.batch_of("ac_model", 1, torch.float32)
    else:
        name = {"ijepa": "ijepa_model", "vjepa": "vjepa_model", "vjepa2": "vjepa2_model_a"}[family]
        module = test_ijepa if family == "ijepa" else test_vjepa
        objective = module.build(name, torch.float32)
        batch = module.batch_of(objective, name, 1, torch.float32)
    torch.manual_seed(seed)
    for parameter in objective.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    optimizer = AdamWEMA(param_groups(objective.roles(), 0.04 + seed), averages=objective.averages())
    optimizer.momentum = 0.9
    objective(batch)["loss"].backward()
    optimizer.step()
    return objective, optimizer


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_in_the_official_layout(family, tmp_path):
    objective, optimizer = trained(0, family)
    path = tmp_path / "jepa-latest.pth.tar"
    save_official(path, objective, optimizer, epoch=7, loss=0.5, batch_size=3, world_size=1, lr=1e-3)
    raw = torch.load(path, weights_only=True)
    target = {"target_encoder"} if family != "vjepa2_ac" else set()
    assert set(raw) == {"encoder", "predictor", "opt", "scaler", "epoch", "loss", "batch_size", "world_size", "lr"} | target
    prefix = "module." if family in ("ijepa", "vjepa2_ac") else "module.backbone."
    assert prefix + "blocks.0.attn.qkv.weight" in raw["encoder"] and prefix + "predictor_norm.bias" in raw["predictor"]
    # what torch.optim.AdamW of the official code would take: groups of encoder and predictor, weights, then biases
    parameters = [[torch.nn.Parameter(torch.zeros_like(value)) for name, value in raw[role].items()
                   if (value.dim() > 1 and "bias" not in name) == is_weight]
                  for is_weight in (True, False) for role in ("encoder", "predictor")]
    assert [len(group["params"]) for group in raw["opt"]["param_groups"]] == [len(group) for group in parameters]
    adamw = torch.optim.AdamW([{"params": group} for group in parameters])
    adamw.load_state_dict(raw["opt"])
    assert all(state["exp_avg"].shape == parameter.shape for parameter, state in adamw.state.items()) and adamw.state
    other, other_optimizer = trained(1, family)
    rest = load_official(path, other, other_optimizer)
    assert rest["epoch"] == 7 and rest["lr"] == 1e-3
    assert_equal(objective.state_dict(), other.state_dict())
    a, b = (o.state_dict() for o in (optimizer, other_optimizer))
    assert a["state"].keys() == b["state"].keys() and a["param_groups"] == b["param_groups"]
    for index, state in a["state"].items():
        assert torch.equal(state["exp_avg"], b["state"][index]["exp_avg"])
        assert float(state["step"]) == float(b["state"][index]["step"]) == 1


def test_the_optimizer_of_a_file_with_frozen_tables_is_renumbered(tmp_path):
    """Official V-JEPA 2 files with tables count them among the parameters; ours has none."""
    objective, optimizer = trained(0, "vjepa2")
    path = tmp_path / "latest.pt"
    save_official(path, objective, optimizer)
    raw = torch.load(path, weights_only=True)
    for role, name in (("encoder", "pos_embed"), ("predictor", "predictor_pos_embed"), ("target_encoder", "pos_embed")):
        raw[role] = {f"module.backbone.{name}": torch.zeros(1, 75, 64)} | raw[role]
    sizes = [len(group["params"]) for group in raw["opt"]["param_groups"]]
    # the encoder's table is parameter 0, the predictor's the first of the second group
    moved = {i + 1 if i < sizes[0] else i + 2: state for i, state in raw["opt"]["state"].items()}
    ends = [0, sizes[0] + 1, sizes[0] + sizes[1] + 2, sum(sizes[:3]) + 2, sum(sizes) + 2]
    groups = [group | {"params": list(range(a, b))} for group, a, b in
              zip(raw["opt"]["param_groups"], ends, ends[1:], strict=False)]
    raw["opt"] = {"state": moved, "param_groups": groups}
    torch.save(raw, path)
    other, other_optimizer = trained(1, "vjepa2")
    load_official(path, other, other_optimizer)
    a, b = (o.state_dict()["state"] for o in (optimizer, other_optimizer))
    assert a.keys() == b.keys() and all(torch.equal(a[i]["exp_avg_sq"], b[i]["exp_avg_sq"]) for i in a)
    raw["opt"]["param_groups"] = raw["opt"]["param_groups"][:2]
    torch.save(raw, path)
    with pytest.raises(ValueError, match="opt must have groups of"):
        load_official(path, other, other_optimizer)


def test_differences_are_named(tmp_path):
    objective, _ = trained(0)
    path = tmp_path / "file.pth.tar"
    save_official(path, objective)
    state = torch.load(path, weights_only=True)
    state["encoder"]["module.norm.weight"] = torch.zeros(7)
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"encoder norm\.weight is \[7\] in the file and \[48\] in the model"):
        load_official(path, objective)
    del state["encoder"]["module.norm.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"encoder norm\.weight is absent in the file"):
        load_official(path, objective)
    del state["predictor"], state["encoder"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="has no encoder"):
        load_official(path, objective)
    model = VisionTransformerConfig(**{"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4})
    report = load_checkpoint(saved(tmp_path, official_file("ijepa")), model.build().to(torch.bfloat16))
    assert report.notes == ("float32 in the file, bfloat16 in the module",)
