"""facebookresearch/vjepa2: app/vjepa/train.py, activation checkpointing as in its files."""

import pathlib

import torch

from .official import MODELS, Sampler, configuration, import_from, run_folder, run_main
from .work import Work, to_float
from .worker import Batches

CONFIGS = {"vjepa2_vitl16": "vitl16/pretrain-256px-16f", "vjepa2_vith16": "vith16/pretrain-256px-16f",
           "vjepa2_vitg16": "vitg16/pretrain-256px-16f", "vjepa2_vitl16_cooldown": "vitl16/cooldown-256px-64f",
           "vjepa2_vith16_cooldown": "vith16/cooldown-256px-64f", "vjepa2_vitg16_cooldown": "vitg16/cooldown-256px-64f",
           "vjepa2_vitg16_384_cooldown": "vitg16/cooldown-384px-64f"}


def loop(work: Work, batches: Batches, *, checkout: pathlib.Path) -> None:
    train = import_from(checkout, "app.vjepa.train")
    settings = configuration(checkout, f"configs/train/{CONFIGS[work.recipe.name]}.yaml")
    objective, config = work.recipe.objective, work.recipe.train
    encoder, predictor = objective.encoder, objective.predictor
    settings["folder"] = run_folder(work)
    settings["data"] |= {"batch_size": config.batch_size, "crop_size": encoder.image_size, "patch_size": encoder.patch_size,
                         "dataset_fpcs": [encoder.num_frames] * len(settings["data"]["dataset_fpcs"])}
    settings["meta"] |= {"dtype": "bfloat16" if config.precision == "bf16" else "float32", "load_checkpoint": False}
    settings["model"] |= {"model_name": model_name(encoder), "pred_depth": predictor.depth,
                          "pred_embed_dim": predictor.embed_dim, "pred_num_heads": predictor.num_heads}
    frames = torch.zeros(config.batch_size, encoder.num_frames)
    batches.prepare(lambda inputs: to_float("clips", inputs["clips"]))
    batches.convert = lambda clips, masks: [([[clips], None, [frames]], masks["context"], masks["target"])]
    train.init_data = lambda **options: (batches, Sampler())
    run_main(train, settings, work, batches, init="init_video_model", prefix="backbone.")


def model_name(encoder) -> str:
    # the repository's ViT-g has 22 heads under another name
    return MODELS[encoder.embed_dim] + ("_xformers" if encoder.num_heads == 22 else "")
