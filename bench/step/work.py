"""The same work for all providers: a recipe, its initial weights, inputs and masks, in a folder."""

import dataclasses
import json
import pathlib
import re
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jepa_fast import recipes
from jepa_fast.checkpoints.official import roles_of
from jepa_fast.data.pixels import normalise
from jepa_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from jepa_fast.objectives.action_conditioned import ActionConditionedConfig
from jepa_fast.objectives.latent_prediction import LatentPredictionConfig
from jepa_fast.objectives.lejepa import LeJEPAConfig
from jepa_fast.objectives.video_prediction import VideoPredictionConfig
from jepa_fast.optim import Horizon

# width, depth, heads of the encoders that the official repositories name alike
ENCODERS = {"t": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}
IMAGES = {"ijepa": 1_281_167, "lejepa": 9_469}  # of ImageNet-1k and Imagenette, for the length of an epoch
NUM_INPUTS = 2  # different batches of pixels, in turn; masks differ in every step


@dataclass(frozen=True, kw_only=True)
class Size:
    """What of a recipe a bench changes; None: as it is."""

    batch_size: int | None = None          # samples of one GPU; None: the official number
    encoder: str | None = None             # vitt16, vits16, vitb16, vitl16, vith14, ...: width, depth, heads and patch
    image_size: int | None = None          # pixels
    num_frames: int | None = None          # of a clip
    predictor_depth: int | None = None     # blocks
    predictor_dim: int | None = None       # width; heads become one per 32


@dataclass(frozen=True)
class Work:
    folder: pathlib.Path
    recipe: recipes.Recipe      # batch size of one GPU, every precision and size set
    steps_per_epoch: int        # of the whole run, for the schedules
    num_steps: int              # masks are there for so many

    @property
    def family(self) -> str:
        return family_of(self.recipe)

    @property
    def horizon(self) -> Horizon:
        return Horizon(self.steps_per_epoch, self.recipe.train.epochs, self.recipe.train.schedule_scale)

    @property
    def device(self) -> torch.device:
        return torch.device(self.recipe.train.device)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Initial weights by role, with the official parameter names."""
        return roles_of(load_file(self.folder / "weights.safetensors"))

    def inputs(self) -> list[dict[str, Tensor]]:
        """uint8 pixels ("images" or "clips"), and whatever else a batch has."""
        return torch.load(self.folder / "inputs.pt", weights_only=True)

    def masks(self) -> list[dict[str, list[Tensor]]]:
        """{"context": lists [B, K], "target": lists [B, K]} of every step; empty where nothing is masked."""
        return torch.load(self.folder / "masks.pt", weights_only=True)


def family_of(recipe: recipes.Recipe) -> str:
    """Which official code trains it: ijepa, vjepa, vjepa2, ac or lejepa."""
    kinds = {LatentPredictionConfig: "ijepa", ActionConditionedConfig: "ac", LeJEPAConfig: "lejepa"}
    if isinstance(recipe.objective, VideoPredictionConfig):
        return "vjepa" if recipe.objective.mask_token_by == "mask" else "vjepa2"
    if type(recipe.objective) not in kinds:
        raise ValueError(f"bench step knows I-JEPA, V-JEPA, V-JEPA 2, V-JEPA 2-AC and LeJEPA, got recipe {recipe.name}")
    return kinds[type(recipe.objective)]


def make(folder: pathlib.Path, recipe: recipes.Recipe, size: Size, *, precision: str, device: str, num_steps: int) -> Work:
    """Write weights, inputs and masks of `num_steps` steps."""
    steps_per_epoch = recipe.train.steps_per_epoch or IMAGES[family_of(recipe)] // recipe.train.batch_size
    recipe = sized(recipe, size, precision, device)
    folder.mkdir(parents=True, exist_ok=True)
    recipes.save(recipe, folder / "recipe.yaml")
    (folder / "work.json").write_text(json.dumps({"steps_per_epoch": steps_per_epoch, "num_steps": num_steps}))
    torch.manual_seed(0)
    objective = recipe.objective.build()
    state = {name: value for name, value in objective.state_dict().items() if not name.startswith("target_encoder.")}
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "weights.safetensors")
    torch.save([make_inputs(recipe) for _ in range(NUM_INPUTS)], folder / "inputs.pt")
    torch.save(make_masks(recipe, num_steps), folder / "masks.pt")
    return load(folder)


def load(folder: pathlib.Path) -> Work:
    return Work(folder, recipes.load(folder / "recipe.yaml"), **json.loads((folder / "work.json").read_text()))


def sized(recipe: recipes.Recipe, size: Size, precision: str, device: str) -> recipes.Recipe:
    """The recipe as one GPU of the official run has it, or smaller."""
    objective, family = recipe.objective, family_of(recipe)
    encoder = {"image_size": size.image_size}
    if family in ("vjepa", "vjepa2"):
        encoder["num_frames"] = size.num_frames
    if size.encoder:
        encoder |= _encoder_fields(size.encoder)
    if family == "lejepa":
        encoder["drop_path"] = 0.0  # whose random numbers no two codes share
    changes: dict = {"encoder": _replace(objective.encoder, **encoder)}
    if family != "lejepa":
        heads = size.predictor_dim and max(1, size.predictor_dim // 32)
        changes["predictor"] = _replace(objective.predictor, depth=size.predictor_depth, embed_dim=size.predictor_dim,
                                        num_heads=heads if objective.predictor.num_heads else None)
    official = {"ac": 8, "lejepa": recipe.train.batch_size}.get(family) or objective.masking.mask_group_size
    batch_size = size.batch_size or official
    if family == "ac":
        changes["encoder_weights"] = "random"
    elif family != "lejepa":
        # the official collators trim masks to the shortest of the batch
        changes["masking"] = dataclasses.replace(objective.masking, mask_group_size=batch_size)
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, got {precision}")
    train = dataclasses.replace(recipe.train, batch_size=batch_size, precision=precision, device=device)
    return dataclasses.replace(recipe, objective=dataclasses.replace(objective, **changes), train=train)


def _encoder_fields(name: str) -> dict:
    match = re.fullmatch(r"vit([a-z])(\d+)", name)
    if not match or match[1] not in ENCODERS:
        raise ValueError(f"encoder must be vit, one of {', '.join(ENCODERS)}, and the patch size, as vits16; got {name!r}")
    width, depth, heads = ENCODERS[match[1]]
    return {"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": 4.0, "patch_size": int(match[2])}


def _replace(config, **changes):
    return dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})


def make_inputs(recipe: recipes.Recipe) -> dict[str, Tensor]:
    """One batch of noise; noise costs what pictures cost."""
    B, encoder, family = recipe.train.batch_size, recipe.objective.encoder, family_of(recipe)
    S, C = encoder.image_size, encoder.in_chans

    def pixels(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8)

    if family == "ijepa":
        return {"images": pixels(B, C, S, S)}
    if family == "lejepa":
        return {"images": pixels(B, _num_views(recipe), C, S, S)}
    if family == "ac":
        T, A = recipe.data.num_frames, recipe.objective.predictor.action_dim
        return {"clips": pixels(B, C, T, S, S), "actions": 0.1 * torch.randn(B, T - 1, A), "states": torch.rand(B, T, A)}
    return {"clips": pixels(B, C, encoder.num_frames, S, S)}


def _num_views(recipe: recipes.Recipe) -> int:
    views = recipe.data.transform
    num_views = getattr(views, "num_views", None)
    if num_views is None or getattr(views, "num_local", 0):
        raise ValueError(f"bench step of LeJEPA needs views of one size, as in lejepa_minimal, got {recipe.name}")
    return num_views


def make_masks(recipe: recipes.Recipe, num_steps: int) -> list[dict[str, list[Tensor]]]:
    """Masks of every step, as the trainer draws them, in the official form."""
    if family_of(recipe) in ("ac", "lejepa"):
        return [{"context": [], "target": []}] * num_steps
    masking, grid, B = recipe.objective.masking, recipe.objective.encoder.grid, recipe.train.batch_size
    drawn = (masking.sample(grid, B, seed=recipe.train.seed, step=step, first_sample=0) for step in range(num_steps))
    return [{"context": masks.context_lists(), "target": masks.target_lists()} for masks in drawn]


def to_float(name: str, pixels: Tensor) -> Tensor:
    """uint8 "images" [..., 3, H, W] or "clips" [B, 3, T, H, W] -> normalised float32, with the statistics of ImageNet."""
    shape = (3, 1, 1, 1) if name == "clips" else (3, 1, 1)
    mean, std = (torch.tensor(values, device=pixels.device).view(shape) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return normalise(pixels, mean, std)
