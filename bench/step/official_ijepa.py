"""facebookresearch/ijepa: src/train.py."""

import pathlib

from .official import MODELS, Sampler, configuration, import_from, run_folder, run_main
from .work import Work, to_float
from .worker import Batches

CONFIGS = {"ijepa_vith14": "in1k_vith14_ep300", "ijepa_vith16_448": "in1k_vith16-448_ep300",
           "ijepa_vith14_in22k": "in22k_vith14_ep66", "ijepa_vitg16_in22k": "in22k_vitg16_ep44"}


def loop(work: Work, batches: Batches, *, checkout: pathlib.Path) -> None:
    train = import_from(checkout, "src.train")
    settings = configuration(checkout, f"configs/{CONFIGS.get(work.recipe.name, 'in1k_vith14_ep300')}.yaml")
    objective, config = work.recipe.objective, work.recipe.train
    settings["data"] |= {"batch_size": config.batch_size, "crop_size": objective.encoder.image_size}
    settings["mask"] |= {"patch_size": objective.encoder.patch_size}
    settings["meta"] |= {"model_name": MODELS[objective.encoder.embed_dim], "use_bfloat16": config.precision == "bf16",
                         "pred_depth": objective.predictor.depth, "pred_emb_dim": objective.predictor.embed_dim}
    settings["logging"]["folder"] = run_folder(work)
    batches.prepare(lambda inputs: to_float("images", inputs["images"]))
    batches.convert = lambda images, masks: ([images], masks["context"], masks["target"])
    train.make_imagenet1k = lambda **options: (None, batches, Sampler())
    run_main(train, settings, work, batches, init="init_model", prefix="")
