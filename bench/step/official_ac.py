"""facebookresearch/vjepa2: app/vjepa_droid/train.py, activation checkpointing as in its file."""

import pathlib

import torch

from .official import Sampler, configuration, import_from, run_folder, run_main
from .official_vjepa2 import model_name
from .work import Work, to_float
from .worker import Batches


def loop(work: Work, batches: Batches, *, checkout: pathlib.Path) -> None:
    train = import_from(checkout, "app.vjepa_droid.train")
    settings = configuration(checkout, "configs/train/vitg16/droid-256px-8f.yaml")
    objective, config = work.recipe.objective, work.recipe.train
    encoder, predictor = objective.encoder, objective.predictor
    settings["folder"] = run_folder(work)
    settings["data"] |= {"batch_size": config.batch_size, "crop_size": encoder.image_size, "patch_size": encoder.patch_size,
                         "dataset_fpcs": [work.recipe.data.num_frames]}
    settings["meta"]["dtype"] = "bfloat16" if config.precision == "bf16" else "float32"
    settings["model"] |= {"model_name": model_name(encoder), "pred_depth": predictor.depth,
                          "pred_embed_dim": predictor.embed_dim, "pred_num_heads": predictor.num_heads}
    extrinsics = torch.zeros(config.batch_size, work.recipe.data.num_frames, 6)
    batches.prepare(lambda inputs: (to_float("clips", inputs["clips"]), inputs["actions"], inputs["states"], extrinsics))
    batches.convert = lambda sample, masks: sample
    train.init_data = lambda **options: (batches, Sampler())
    train.load_pretrained = lambda encoder, predictor, target_encoder, **options: (encoder, predictor, target_encoder)
    run_main(train, settings, work, batches, init="init_video_model", prefix="")
