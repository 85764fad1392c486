"""rbalestr-lab/lejepa: the script of MINIMAL.md, read from the checkout and run as it stands.

Put in for the run: our loader and weights, silent loggers, the device, whether autocast is on, the size of the encoder, and
a drop-path rate of 0, since no two codes share its random numbers. Its online probe trains along, as in its loop.
"""

import pathlib
import re
import sys
import types
from unittest.mock import MagicMock

import torch

from .official import import_from, put_weights
from .work import Work, to_float
from .worker import Batches

NAMES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}


def loop(work: Work, batches: Batches, *, checkout: pathlib.Path) -> None:
    import_from(checkout, "lejepa.__init__")
    log = types.ModuleType("wandb")
    log.init = log.finish = lambda **options: None
    log.log = lambda row: batches.record(row["train/lejepa"])
    hydra = types.ModuleType("hydra")
    hydra.main = lambda **options: lambda function: function
    sys.modules |= {"wandb": log, "hydra": hydra, "omegaconf": MagicMock(), "datasets": MagicMock()}

    script = types.ModuleType("lejepa_minimal")
    exec(compile(source(work, checkout), str(checkout / "MINIMAL.md"), "exec"), vars(script))
    weights, encoder_class = work.weights(), script.ViTEncoder

    def with_weights(**options) -> torch.nn.Module:
        net = encoder_class(**options)
        put_weights(net.backbone, weights["encoder"])
        # torchvision's MLP has a dropout after every layer: four modules for our three
        linear = {re.sub(r"^(\d+)", lambda m: str(int(m[1]) // 3 * 4 + int(m[1]) % 3), name): value
                  for name, value in weights["projector"].items()}
        put_weights(net.proj, linear)
        batches.regions(context=(net.backbone, "forward"))
        return net

    script.ViTEncoder = with_weights
    script.HFDataset = lambda *options, **named: range(1)
    script.DataLoader = lambda *options, **named: batches
    config, train = work.recipe.objective, work.recipe.train
    labels = torch.zeros(train.batch_size, dtype=torch.int64)
    batches.prepare(lambda inputs: (to_float("images", inputs["images"]), labels))
    batches.convert = lambda sample, masks: sample
    script.main(Settings(bs=train.batch_size, V=work.inputs()[0]["images"].shape[1], lamb=config.lamb,
                         proj_dim=config.projector[-1], lr=work.recipe.optim.lr.peak, epochs=int(train.epochs)))


class Settings(dict):
    """What the script takes from its command line."""

    __getattr__ = dict.__getitem__


def source(work: Work, checkout: pathlib.Path) -> str:
    """The Python of MINIMAL.md with this work's size. ValueError where it no longer has what is to be changed."""
    text = (checkout / "MINIMAL.md").read_text()
    code = "\n".join(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "import torch" in block
                     or "class " in block or "def main" in block)
    encoder, train = work.recipe.objective.encoder, work.recipe.train
    changes = {"vit_small_patch8_224": f"vit_{NAMES.get(encoder.embed_dim)}_patch{encoder.patch_size}_224",
               "img_size=128": f"img_size={encoder.image_size}", "drop_path_rate=0.1": "drop_path_rate=0.0",
               '"cuda"': f'"{work.device.type}"',
               "dtype=torch.bfloat16": f"dtype=torch.bfloat16, enabled={train.precision == 'bf16'}"}
    for old, new in changes.items():
        if old not in code:
            raise ValueError(f"MINIMAL.md of {checkout} has no {old}: it is not the version that this bench knows")
        code = code.replace(old, new)
    return code
