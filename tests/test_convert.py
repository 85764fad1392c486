"""Checkpoints from any format to any other: by value against transformers, to the bit where nothing is computed."""

import dataclasses
import json
import shutil

import pytest
import torch
from golden_data import config, error, golden, under
from official_files import HEADS, official_file, roles
from test_train import assert_equal_states, state_of, tiny

from jepa_fast.checkpoints import convert, export, hf_ijepa, hf_vjepa2, load_checkpoint, load_encoder, read
from jepa_fast.checkpoints._names import join_split, split_joined
from jepa_fast.checkpoints._write import whole
from jepa_fast.checkpoints.native import configs, of_objective
from jepa_fast.cli import main
from jepa_fast.eval.attentive import AttentiveProbe
from jepa_fast.masking import Masks, MultiBlock3D
from jepa_fast.models.encoder import VisionTransformerConfig
from jepa_fast.models.resnet import ResNetConfig
from jepa_fast.models.video_encoder import VideoTransformerConfig
from jepa_fast.models.video_predictor import VideoPredictor, VideoPredictorConfig
from jepa_fast.objectives.video_prediction import VideoPredictionConfig
from jepa_fast.train.loop import train

transformers = pytest.importorskip("transformers")

TOLERANCE = 5e-6  # float32, as for golden data
IMAGE = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, image_size=48, patch_size=8,
             layer_norm_eps=1e-6)
VIDEO = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, crop_size=32, patch_size=8, frames_per_clip=4,
             pred_hidden_size=24, pred_num_hidden_layers=2, pred_num_attention_heads=2, pred_num_mask_tokens=4,
             num_pooler_layers=2)


def saved(tmp_path, family: str, **options):
    torch.save(official_file(family, **options), tmp_path / f"{family}.pt")
    return tmp_path / f"{family}.pt"


def moved(model, seed: int = 0):
    """Random weights that all matter: no zero biases, no unit norms."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def loaded(cls, folder, **options):
    """from_pretrained; nothing missing, nothing left over."""
    model, report = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()


# Hugging Face, by value

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, TOLERANCE), (torch.float64, 1e-12)])
def test_i_jepa_to_hugging_face(dtype, tolerance, tmp_path):
    convert(saved(tmp_path, "ijepa"), tmp_path / "hf", "hf", encoder={"num_heads": HEADS})
    theirs = loaded(transformers.IJepaModel, tmp_path / "hf", add_pooling_layer=False).to(dtype)
    ours = load_encoder(tmp_path / "ijepa.pt", num_heads=HEADS).to(dtype)
    images = torch.randn(3, 3, 32, 32, dtype=dtype)
    a, b = ours(images), theirs(images).last_hidden_state
    assert error(a, b.detach()) < tolerance
    a.square().sum().backward()
    b.square().sum().backward()
    patches = theirs.embeddings.patch_embeddings.projection
    assert error(ours.patch_embed.proj.weight.grad, patches.weight.grad) < 10 * tolerance


def test_i_jepa_from_hugging_face(tmp_path):
    theirs = moved(transformers.IJepaModel(transformers.IJepaConfig(**IMAGE), add_pooling_layer=False))
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_encoder(tmp_path / "hf", "encoder")
    images = torch.randn(3, 3, 48, 48)
    assert error(ours(images), theirs(images).last_hidden_state.detach()) < TOLERANCE
    # names in memory, which transformers 5 changed, and as a file that torch.save wrote
    assert_equal(hf_ijepa.from_hf(theirs.state_dict())["encoder"], ours.state_dict())
    names = "memory" if "layers.0.mlp.fc1.weight" in theirs.state_dict() else "disk"
    assert_equal(hf_ijepa.to_hf({"encoder": ours.state_dict()}, names), theirs.state_dict())
    torch.save(theirs.state_dict(), tmp_path / "state.pt", _use_new_zipfile_serialization=False)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "bin")
    torch.save(hf_ijepa.to_hf({"encoder": ours.state_dict()}), tmp_path / "bin" / "pytorch_model.bin")
    for name in ("state.pt", "shards", "bin", "hf/model.safetensors"):
        found = read(tmp_path / name)
        assert (found.format, found.family) == ("hf", "ijepa")
        assert_equal(found.roles["encoder"], ours.state_dict())


def test_i_jepa_classifier(tmp_path):
    settings = transformers.IJepaConfig(**IMAGE, num_labels=5)
    theirs = moved(transformers.IJepaForImageClassification(settings))
    theirs.save_pretrained(tmp_path / "hf")
    found = read(tmp_path / "hf")
    assert set(found.roles) == {"encoder", "probe"} and list(found.roles["probe"]) == ["linear.bias", "linear.weight"]
    convert(tmp_path / "hf", tmp_path / "again", "hf", which="encoder")
    again = loaded(transformers.IJepaForImageClassification, tmp_path / "again")
    assert_equal(again.state_dict(), theirs.state_dict())


def test_v_jepa_2_to_hugging_face_computes_what_the_official_code_does(tmp_path):
    """Golden weights -> an official file -> a Hugging Face folder -> golden outputs, encoder and predictor."""
    name = "vjepa2_model_a"
    data, args = golden(name), config(name)["args"]
    file = {role: {f"module.{key}": value for key, value in under(data, f"weights/{role}/").items()}
            for role in ("encoder", "predictor", "target_encoder")}
    # transformers predicts with token 1, V-JEPA 2 with token 0
    tokens = [f"module.backbone.mask_tokens.{j}" for j in (0, 1)]
    file["predictor"] |= {tokens[0]: file["predictor"][tokens[1]], tokens[1]: file["predictor"][tokens[0]]}
    torch.save(file, tmp_path / "latest.pt")
    reports = convert(tmp_path / "latest.pt", tmp_path / "hf", "hf", encoder={
        "num_heads": config(name)["encoder"]["num_heads"], "image_size": args["data"]["crop_size"],
        "num_frames": args["data"]["num_frames"]}, predictor={"num_heads": args["model"]["pred_num_heads"]})
    assert any("transformers predicts with mask_tokens[1]" in note for note in reports[0].notes)
    theirs = loaded(transformers.VJEPA2Model, tmp_path / "hf")
    step = under(data, "input/step1/")
    clips = step["pixels"].transpose(1, 2)
    with torch.no_grad():
        assert error(theirs(clips, skip_predictor=True).last_hidden_state, data["out/target_full"]) < TOLERANCE
        for i in (0, 1):
            context, target = step[f"context{i}"], step[f"target{i}"]
            tokens = torch.zeros_like(data["out/target_full"])
            tokens.scatter_(1, context.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]), data[f"out/context{i}"])
            prediction = theirs.predictor(tokens, [context], [target]).last_hidden_state
            assert error(prediction, data[f"out/prediction{i}"]) < TOLERANCE


def test_v_jepa_2_from_hugging_face(tmp_path):
    theirs = moved(transformers.VJEPA2Model(transformers.VJEPA2Config(**VIDEO)))
    theirs.save_pretrained(tmp_path / "hf")
    encoder = load_encoder(tmp_path / "hf", "encoder")
    clips = torch.randn(2, 3, 4, 32, 32)
    context = torch.stack([torch.randperm(32)[:12].sort().values for _ in range(2)])
    target = torch.stack([torch.randperm(32)[:9].sort().values for _ in range(2)])
    with torch.no_grad():
        out = theirs(clips.transpose(1, 2), context_mask=[context], target_mask=[target])
        tokens = encoder(clips)
        assert error(tokens, out.last_hidden_state) < TOLERANCE
        fields = read(tmp_path / "hf").fields("predictor")
        predictor = VideoPredictor(VideoPredictorConfig(**fields), encoder.config)
        load_checkpoint(tmp_path / "hf", predictor, "predictor")
        masks = Masks.from_lists([context], [target], 32, is_paired=True).pack()
        rows = tokens.flatten(0, 1)[masks.context_idx]
        # the token that transformers takes
        prediction = predictor(rows, masks, encoder.config.grid, slice(1, 2))
        assert error(prediction.view(2, 9, -1), out.predictor_output.last_hidden_state) < TOLERANCE
    assert_equal(hf_vjepa2.to_hf(read(tmp_path / "hf").roles), theirs.state_dict())


def test_v_jepa_2_classifier_and_the_official_probe(tmp_path):
    theirs = moved(transformers.VJEPA2ForVideoClassification(transformers.VJEPA2Config(**VIDEO, num_labels=3)))
    theirs.save_pretrained(tmp_path / "hf")
    found = read(tmp_path / "hf")
    assert set(found.roles) == {"encoder", "predictor", "probe"}
    probe = found.roles["probe"]
    # the names of official probe files, in which a probe is module.pooler and module.linear
    assert probe["pooler.cross_attention_block.xattn.kv.weight"].shape == (96, 48)
    assert probe["pooler.blocks.1.attn.qkv.weight"].shape == (144, 48) and probe["linear.weight"].shape == (3, 48)
    torch.save({"classifiers": [{f"module.{name}": value for name, value in probe.items()}], "epoch": 1}, tmp_path / "p.pt")
    assert_equal(read(tmp_path / "p.pt").roles["probe"], probe)
    # the same function as our probe, but for the epsilon of its norms
    ours = AttentiveProbe(48, 3, depth=3, num_heads=4)
    load_checkpoint(tmp_path / "hf", ours, "probe")
    for module in theirs.pooler.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    tokens = torch.randn(2, 10, 48)
    with torch.no_grad():
        assert error(ours(tokens), theirs.classifier(theirs.pooler(tokens))) < TOLERANCE
    reports = convert(tmp_path / "hf", tmp_path / "again", "hf", which="encoder")
    assert any("epsilon" in note for note in reports[0].notes)
    again = loaded(transformers.VJEPA2ForVideoClassification, tmp_path / "again")
    assert_equal(again.state_dict(), theirs.state_dict())
    assert again.config.num_labels == 3 and len(again.pooler.self_attention_layers) == 2


def test_released_v_jepa_2_needs_no_sizes_for_hugging_face(tmp_path):
    """The unused table tells pixels and frames; it is reported as left out."""
    path = saved(tmp_path, "vjepa2", with_table=True, num_mask_tokens=10)
    given = {"encoder": {"num_heads": HEADS}, "predictor": {"num_heads": 2}}
    encoder, predictor = convert(path, tmp_path / "hf", "hf", **given)
    assert list(encoder.ignored) == ["pos_embed"] and list(predictor.ignored) == ["predictor_pos_embed"]
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (settings["crop_size"], settings["frames_per_clip"], settings["pred_num_mask_tokens"]) == (32, 4, 10)
    loaded(transformers.VJEPA2Model, tmp_path / "hf")
    with pytest.raises(ValueError, match="do not tell image_size and num_frames: pass them in encoder"):
        convert(saved(tmp_path, "vjepa2"), tmp_path / "other", "hf", **given)


@pytest.mark.parametrize("family", ["vjepa", "vjepa2_ac", "vjepa2_1"])
def test_what_hugging_face_has_no_class_for(family, tmp_path):
    with pytest.raises(ValueError, match=f"transformers has classes for I-JEPA and V-JEPA 2; .* is {family}"):
        convert(saved(tmp_path, family), tmp_path / "hf", "hf")
    with pytest.raises(ValueError, match="class_token=False, got True"):
        hf_ijepa.config_to_hf(dataclasses.asdict(VisionTransformerConfig(class_token=True)))


def test_a_predictor_with_as_many_heads_as_the_encoder(tmp_path):
    """num_heads None in a recipe means the encoder's, also where the width is the official one of 12 heads."""
    objective = VideoPredictionConfig(
        encoder=VideoTransformerConfig(image_size=16, num_frames=2, patch_size=8, embed_dim=48, depth=1, num_heads=4,
                                       positions="rotary"),
        predictor=VideoPredictorConfig(embed_dim=384, depth=1), masking=MultiBlock3D(mode="unbiased")).build()
    file = of_objective(objective)
    assert configs(file, file.roles)["predictor"]["num_heads"] == 4
    assert configs(dataclasses.replace(file, config={}), file.roles, {"num_heads": 4})["predictor"]["num_heads"] == 12


# to the bit

@pytest.mark.parametrize("family", ["ijepa", "vjepa", "vjepa2", "vjepa2_ac", "vjepa2_1"])
def test_official_to_safetensors_and_back(family, tmp_path):
    path = saved(tmp_path, family)
    convert(path, tmp_path / "weights", "safetensors")
    assert {item.name for item in (tmp_path / "weights").iterdir()} == {
        "config.json", "encoder.safetensors", "predictor.safetensors", "target_encoder.safetensors"}
    found = read(tmp_path / "weights")
    assert found.family == family and found.format == "safetensors"
    for role, state in roles(family).items():
        assert_equal(found.roles[role], state)
    convert(tmp_path / "weights", tmp_path / "again.pt", "official")
    again, file = torch.load(tmp_path / "again.pt", weights_only=True), official_file(family)
    assert again.keys() == file.keys()
    for role in roles(family):
        assert_equal(again[role], file[role])
    alone = read(tmp_path / "weights" / "target_encoder.safetensors")
    assert alone.family == family and list(alone.roles) == ["target_encoder"]
    assert_equal(alone.roles["target_encoder"], roles(family)["target_encoder"])


def test_joined_projections_come_apart_and_together():
    state = roles("vjepa")["encoder"]
    apart = split_joined(state)
    assert torch.equal(apart["blocks.1.attn.k.weight"], state["blocks.1.attn.qkv.weight"][48:96])
    assert_equal(join_split(apart), state)
    del apart["blocks.1.attn.v.bias"]
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.q\.bias without blocks\.1\.attn\.v\.bias"):
        join_split(apart)
    with pytest.raises(ValueError, match=r"IJepaModel has no place for extra \[1\]"):
        hf_ijepa.to_hf({"encoder": {"extra": torch.zeros(1)}})


def test_a_run_goes_to_an_official_file_and_comes_back_to_go_on(tmp_path):
    """run -> official file -> run folder: training goes on from it bit-equal to the run that was never converted."""
    recipe = tiny("ijepa_mnist", max_steps=3)
    train(recipe, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "latest.pth.tar", "official")
    raw = torch.load(tmp_path / "latest.pth.tar", weights_only=True)
    assert raw["epoch"] == 0 and raw["loss"] > 0 and raw["lr"] > 0 and len(raw["opt"]["param_groups"]) == 4
    convert(tmp_path / "run", tmp_path / "hf", "hf")
    images = torch.randn(2, 1, 28, 28)
    theirs = loaded(transformers.IJepaModel, tmp_path / "hf", add_pooling_layer=False)
    assert error(load_encoder(tmp_path / "run")(images), theirs(images).last_hidden_state.detach()) < TOLERANCE
    convert(tmp_path / "latest.pth.tar", tmp_path / "back", "ours", recipe=recipe)
    assert state_of(tmp_path / "back")["step"] == 3
    assert_equal_states(state_of(tmp_path / "back")["objective"], state_of(tmp_path / "run")["objective"])
    longer = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, max_steps=5))
    for folder in ("run", "back"):
        train(longer, tmp_path / folder, resume=True)
    assert_equal_states(state_of(tmp_path / "back"), state_of(tmp_path / "run"))
    assert state_of(tmp_path / "back")["step"] == 5
    with pytest.raises(ValueError, match=r"encoder pos_embed is \[1, 16, 48\] in the file and \[1, 49, 48\] in the model"):
        convert(saved(tmp_path, "ijepa"), tmp_path / "wrong", "ours", recipe=recipe)
    assert not (tmp_path / "wrong").exists() and not list(tmp_path.glob(".*"))


def test_runs_of_ours_say_their_configs(tmp_path):
    recipe = tiny("lejepa_mnist", max_steps=1)
    train(recipe, tmp_path / "run")
    found = read(tmp_path / "run")
    assert found.format == "run" and found.family is None and {"encoder", "projector"} <= set(found.roles)
    convert(tmp_path / "run", tmp_path / "weights", "safetensors", which="encoder")
    encoder = recipe.objective.encoder.build()
    load_checkpoint(tmp_path / "weights", encoder, "encoder")
    assert_equal(encoder.state_dict(), found.roles["encoder"])
    with pytest.raises(ValueError, match="is of none of ijepa, vjepa"):
        convert(tmp_path / "run", tmp_path / "no.pt", "official")
    residual = tiny("lejepa_mnist", max_steps=1)
    residual = dataclasses.replace(residual, objective=dataclasses.replace(
        residual.objective, encoder=ResNetConfig(image_size=28, in_chans=1, width=8, depths=(1, 1), stem="small")))
    train(residual, tmp_path / "residual")
    export(tmp_path / "residual", tmp_path / "residual_weights")
    encoder = load_encoder(tmp_path / "residual_weights", "encoder")
    assert_equal(encoder.state_dict(), read(tmp_path / "residual").roles["encoder"])
    with pytest.raises(ValueError, match="no encoder has all of the fields .*, num_head"):
        load_encoder(tmp_path / "residual", "encoder", num_head=4)
    objective = tiny("ijepa_mnist").objective.build()
    export(objective, tmp_path / "objective")
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(load_encoder(tmp_path / "objective")(images), objective.target_encoder.encoder(images))


# the command line

def fails(capsys, *argv: str) -> str:
    assert main(["convert", *map(str, argv)]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("\n") == 1, err
    return err


def test_command_line(tmp_path, capsys):
    path, target = saved(tmp_path, "ijepa"), tmp_path / "hf"
    command = ["convert", str(path), str(target), "--to", "hf", "--which", "encoder", "--num-heads", str(HEADS)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "encoder of" in out and "blocks.0-1.attn.qkv.weight" in out and "predictor is left out" in out
    assert f"written: {target}" in out
    assert "exists already: pass force (--force)" in fails(capsys, *command[1:])
    (target / "stale.safetensors").touch()
    assert main([*command, "--force"]) == 0 and not (target / "stale.safetensors").exists()
    capsys.readouterr()
    assert_equal(read(target).roles["encoder"], roles("ijepa")["encoder"])
    assert "no file" in fails(capsys, tmp_path / "vitg.pt", "x", "--to", "hf")
    assert "takes every role, got which='encoder'" in fails(capsys, path, "x", "--to", "ours", "--which", "encoder")
    assert "pass recipe (--recipe NAME" in fails(capsys, path, tmp_path / "run", "--to", "ours")
    assert "unknown recipe 'ijepa'" in fails(capsys, path, tmp_path / "run", "--to", "ours", "--recipe", "ijepa")
    assert "has no ema_encoder; it holds encoder, predictor, target_encoder" in fails(
        capsys, path, tmp_path / "x", "--to", "safetensors", "--which", "ema_encoder")
    assert "no official model is 48 wide: pass num_heads" in fails(capsys, path, tmp_path / "x", "--to", "hf")
    (target / "config.json").write_text("{")
    assert "config.json is not JSON" in fails(capsys, target, tmp_path / "x", "--to", "hf")
    assert "the same" in fails(capsys, path, path, "--to", "official", "--force")
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "https://dl.fbaipublicfiles.com/vjepa2/vjepa2_1_vitG_384.pt" in capsys.readouterr().out.replace("\n", "")


def test_a_target_appears_whole_or_stays_as_it_was(tmp_path):
    folder = tmp_path / "target"
    with whole(folder) as path:
        path.mkdir()
        (path / "config.json").write_text("first")
    with pytest.raises(RuntimeError), whole(folder, force=True) as path:
        path.mkdir()
        raise RuntimeError("killed half-way")
    assert (folder / "config.json").read_text() == "first" and [item.name for item in tmp_path.iterdir()] == ["target"]
    (folder / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds thesis.tex, which is not replaced"), whole(folder, force=True):
        pass
    (folder / "thesis.tex").unlink()
    with whole(folder, force=True) as path:
        path.write_text("a file now")
    assert folder.read_text() == "a file now" and [item.name for item in tmp_path.iterdir()] == ["target"]
    with pytest.raises(ValueError, match="exists already"), whole(folder):
        pass
