"""facebookresearch/jepa: app/vjepa/train.py."""

import pathlib

from .official import MODELS, Sampler, configuration, import_from, run_folder, run_main
from .work import Work, to_float
from .worker import Batches

CONFIGS = {"vjepa_vitl16": "vitl16", "vjepa_vith16": "vith16", "vjepa_vith16_384": "vith16_384"}


def loop(work: Work, batches: Batches, *, checkout: pathlib.Path) -> None:
    train = import_from(checkout, "app.vjepa.train")
    settings = configuration(checkout, f"configs/pretrain/{CONFIGS[work.recipe.name]}.yaml")
    objective, config = work.recipe.objective, work.recipe.train
    encoder, predictor = objective.encoder, objective.predictor
    settings["logging"]["folder"] = run_folder(work)
    settings["data"] |= {"batch_size": config.batch_size, "crop_size": encoder.image_size, "patch_size": encoder.patch_size,
                         "num_frames": encoder.num_frames, "tubelet_size": encoder.tubelet_size}
    settings["meta"]["dtype"] = "bfloat16" if config.precision == "bf16" else "float32"
    settings["model"] |= {"model_name": MODELS[encoder.embed_dim], "pred_depth": predictor.depth,
                          "pred_embed_dim": predictor.embed_dim}
    batches.prepare(lambda inputs: to_float("clips", inputs["clips"]))
    batches.convert = lambda clips, masks: ([[clips]], masks["context"], masks["target"])
    train.init_data = lambda **options: (batches, Sampler())
    run_main(train, settings, work, batches, init="init_video_model", prefix="backbone.")
