"""Put a checkpoint of any kind into a module, strictly, or make the encoder from the file alone."""

import dataclasses
import math
import pathlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models.encoder import VisionTransformerConfig
from ..models.resnet import ResNetConfig
from ..models.video_encoder import VideoTransformerConfig
from ..models.video_encoder21 import HierarchicalVideoTransformerConfig
from ..nn.positions import sincos_3d
from ._names import State, folded
from .official import TRAINED, objective_of, optimizer_groups, optimizer_names, renumbered, roles_of
from .sniff import FORMATS, Foreign, read

# official table of widths: V-JEPA 2's ViT-g and the ViT-G of 2.1 have heads of 64, I-JEPA's ViT-g has 16 heads of 88
NUM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
NUM_HEADS_IMAGE = NUM_HEADS | {1408: 16, 1664: 16}
NUM_HEADS_VIDEO = NUM_HEADS | {1408: 22, 1664: 26}
LEVELS = {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 40: (9, 19, 29, 39), 48: (11, 23, 37, 47)}  # of V-JEPA 2.1, by depth

ENCODERS = (VisionTransformerConfig, VideoTransformerConfig, HierarchicalVideoTransformerConfig, ResNetConfig)

UNUSED_TABLE = "positions are rotary; released files carry the table all the same"
MAY_IGNORE = {  # family -> what a file may hold beyond the model, and why
    "vjepa2": {"pos_embed": UNUSED_TABLE, "predictor_pos_embed": UNUSED_TABLE},
    "vjepa2_ac": {"pos_embed": UNUSED_TABLE, "predictor_pos_embed": UNUSED_TABLE},
}


@dataclass(frozen=True)
class Report:
    """What became of every tensor of one role of a checkpoint, and of the module that took it."""

    source: str
    role: str
    loaded: tuple[str, ...]
    ignored: dict[str, str] = field(default_factory=dict)  # of the file: name -> why
    missing: dict[str, str] = field(default_factory=dict)  # of the module: name -> why it kept its value
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.role} of {self.source}: {len(self.loaded)} tensors, {len(self.ignored)} ignored, "
                 f"{len(self.missing)} missing"]
        lines += [f"  {name}" for name in folded(list(self.loaded))]
        lines += [f"  ignored {name}: {why}" for name, why in self.ignored.items()]
        lines += [f"  missing {name}: {why}" for name, why in self.missing.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def load_checkpoint(path: str | pathlib.Path | Foreign, module: nn.Module, which: str = "target_encoder", *,
                    family: str | None = None, resize_mask_tokens: bool = False) -> Report:
    """Load one role (encoder, target_encoder, ema_encoder, predictor) of a checkpoint into a module, strictly.

    What a generation's files hold beyond the model is ignored and reported; everything else that differs is a
    ValueError with the first difference, both shapes side by side. resize_mask_tokens: a predictor with fewer mask
    tokens takes the first ones, one with more keeps its own beyond the file's.
    """
    file = path if isinstance(path, Foreign) else read(path, family=family)
    state, ignored, missing = fitted(file, which, module.state_dict(), resize_mask_tokens=resize_mask_tokens)
    loaded = tuple(name for name in state if name not in missing)
    kinds = {(str(file.roles[which][name].dtype)[6:], str(value.dtype)[6:]) for name, value in module.state_dict().items()
             if name in loaded}
    notes = tuple(f"{theirs} in the file, {ours} in the module" for theirs, ours in sorted(kinds) if theirs != ours)
    module.load_state_dict(state)
    return Report(source_of(file), which, loaded, ignored, missing, notes)


def load_official(path: str | pathlib.Path | Foreign, objective: nn.Module,
                  optimizer: torch.optim.Optimizer | None = None, *, resize_mask_tokens: bool = False) -> dict:
    """Put all roles of an official file into an objective, strictly; returns its other entries (epoch, loss, ...).

    The optimizer, made by `param_groups(objective.roles(), ...)`, takes the state of the parameters of the same names.
    Raises ValueError, naming role and parameter, where one is missing, left over or of another shape.
    """
    file = path if isinstance(path, Foreign) else read(path)
    own = roles_of(objective.state_dict())
    objective.load_state_dict(objective_of(fitted_roles(file, own, resize_mask_tokens=resize_mask_tokens)))
    if optimizer is not None and file.other.get("opt") is not None:
        state = optimizer.state_dict()
        state["state"] = optimizer_state(file, own, list(objective.roles()))
        settings = dict(zip(optimizer_groups(TRAINED), file.other["opt"]["param_groups"], strict=True))
        for name, group in zip(optimizer_groups(objective.roles()), state["param_groups"], strict=True):
            group |= {key: settings[name][key] for key in ("lr", "betas", "eps", "weight_decay")}
        optimizer.load_state_dict(state)
    return {key: value for key, value in file.other.items() if key != "opt"}


def optimizer_state(file: Foreign, own: dict[str, State], trained: list[str]) -> dict[int, dict]:
    """The optimizer's state in a file, numbered as the parameters of the roles that train here."""
    in_file = optimizer_names({role: file.role(role) for role in TRAINED})
    return renumbered(file.other["opt"], in_file, optimizer_names({role: own[role] for role in trained}))


def fitted_roles(file: Foreign, own: dict[str, State], *, resize_mask_tokens: bool = False) -> dict[str, State]:
    return {role: fitted(file, role, state, resize_mask_tokens=resize_mask_tokens)[0] for role, state in own.items()}


def fitted(file: Foreign, role: str, ours: State, *,
           resize_mask_tokens: bool = False) -> tuple[State, dict[str, str], dict[str, str]]:
    """(a state with exactly the names and shapes of `ours`, ignored, missing); ValueError names the first difference."""
    theirs, may_ignore = file.role(role), MAY_IGNORE.get(file.family or "", {})
    state, ignored, missing, differences = {}, {}, {}, []
    for name, value in ours.items():
        if name in theirs and theirs[name].shape == value.shape:
            state[name] = theirs[name]
        elif name not in theirs and resize_mask_tokens and name.startswith("mask_tokens."):
            state[name], missing[name] = value, "the file has fewer mask tokens"
        else:
            differences.append(name)
    for name in [name for name in theirs if name not in ours]:
        if name in may_ignore:
            ignored[name] = f"{list(theirs[name].shape)}, {may_ignore[name]}"
        elif resize_mask_tokens and name.startswith("mask_tokens."):
            ignored[name] = "the model has fewer mask tokens"
    differences += [name for name in theirs if name not in ours and name not in ignored]
    if differences:
        first = differences[0]
        said = ["absent" if first not in side else str(list(side[first].shape)) for side in (theirs, ours)]
        more = f"; {len(differences) - 1} more differ" if len(differences) > 1 else ""
        hint = "; resize_mask_tokens takes the first ones" if first.startswith("mask_tokens.") else ""
        raise ValueError(f"{file.path}: {role} {first} is {said[0]} in the file and {said[1]} in the model{more}{hint}")
    return state, ignored, missing


def load_encoder(path: str | pathlib.Path | Foreign, which: str = "target_encoder", *, family: str | None = None,
                 **fields) -> nn.Module:
    """The encoder of a checkpoint, built from the file alone, in eval mode.

    `fields` of its config are put over what the file tells (a V-JEPA 2 file without a table does not tell image_size and
    num_frames; with rotary positions they bind nothing). ValueError where the number of heads cannot be known.
    """
    file = path if isinstance(path, Foreign) else read(path, family=family)
    encoder = build_encoder(encoder_fields(file, which, **fields))
    load_checkpoint(file, encoder, which)
    return encoder.eval()


def encoder_fields(file: Foreign, which: str, **fields) -> dict:
    """Fields of the encoder's config: given, else as the file says, else read off the tensors."""
    said = file.fields(which)
    if not said:
        said = infer_config(file.role(which), file.family, fields.get("num_heads"), fields.get("levels"), where=file.path)
    return said | fields


def build_encoder(fields: dict) -> nn.Module:
    """The encoder of the first class in ENCODERS whose config has all these fields."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    for config in ENCODERS:
        if fields.keys() <= {known.name for known in dataclasses.fields(config)}:
            return config(**fields).build()
    raise ValueError(f"no encoder has all of the fields {', '.join(fields)}")


def infer_config(state: State, family: str | None = None, num_heads: int | None = None,
                 levels: tuple[int, ...] | None = None, *, where: str = "file") -> dict:
    """Fields of an encoder's config from its tensors: of images, of clips, or of V-JEPA 2.1 (those with levels).

    num_heads and levels are not in the tensors: the official ones of the width and the depth, unless given.
    """
    if "patch_embed.proj.weight" not in state or not {"norm.weight", "norms_block.0.weight"} & state.keys():
        raise ValueError(f"{where}: a vision transformer has patch_embed.proj.weight, and norm.weight or norms_block, "
                         f"got {', '.join(list(state)[:4])}, ...")
    stem = state["patch_embed.proj.weight"]
    D, is_video = stem.shape[0], stem.dim() == 5
    heads = num_heads or (NUM_HEADS_VIDEO if is_video else NUM_HEADS_IMAGE).get(D)
    if heads is None:
        raise ValueError(f"{where}: no official model is {D} wide: pass num_heads")
    fields = {"patch_size": stem.shape[-1], "in_chans": stem.shape[1], "num_heads": heads,
              **block_fields(state, "blocks")}
    if "norms_block.0.weight" in state:
        return fields | {"tubelet_size": stem.shape[2], "levels": _levels(state, fields["depth"], levels, where)}
    if is_video:
        return fields | {"tubelet_size": stem.shape[2]} | _video_positions(state, family, fields, stem.shape[2], where)
    tokens = state["pos_embed"].shape[1] - ("cls_token" in state)
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"{where}: pos_embed must be of a square grid, got {tokens} tokens")
    extra = {"class_token": True, "positions": "learned"} if "cls_token" in state else {}
    if "head.weight" in state:
        extra["num_outputs"] = len(state["head.weight"])
    return fields | {"image_size": math.isqrt(tokens) * stem.shape[-1]} | extra


def infer_predictor(state: State, num_heads: int | None = None, *, where: str = "file") -> dict:
    """Fields of a VideoPredictorConfig from its tensors; 12 heads at the official width of 384, unless given."""
    fields = block_fields(state, "predictor_blocks")
    heads = num_heads or {384: 12}.get(fields["embed_dim"])
    if heads is None:
        raise ValueError(f"{where}: no official predictor is {fields['embed_dim']} wide: pass the predictor's num_heads")
    return fields | {"num_heads": heads, "num_mask_tokens": sum(name.startswith("mask_tokens.") for name in state)}


def block_fields(state: State, blocks: str) -> dict:
    """Width, depth and MLP ratio of a stack of blocks."""
    hidden, D = state[f"{blocks}.0.mlp.fc1.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith(f"{blocks}."))
    return {"embed_dim": D, "depth": depth, "mlp_ratio": hidden / D}


def _levels(state: State, depth: int, given: tuple[int, ...] | None, where: str) -> tuple[int, ...]:
    """Blocks with a norm of their own: the official ones of the depth; the last block where there is one norm."""
    count = sum(name.startswith("norms_block.") and name.endswith("weight") for name in state)
    levels = given or LEVELS.get(depth) if count > 1 else (depth - 1,)
    if levels is None or len(levels) != count:
        raise ValueError(f"{where}: no official model of {depth} blocks has {count} levels: pass levels, their numbers")
    return tuple(levels)


def _video_positions(state: State, family: str | None, fields: dict, tubelet_size: int, where: str) -> dict:
    """Kind of positions, and image_size and num_frames where a sine-cosine table tells them."""
    positions = {"positions": "sincos" if family == "vjepa" else "rotary"}
    if "pos_embed" not in state:
        return positions
    grid = _grid_of(state["pos_embed"][0])
    if grid is None and family == "vjepa":
        raise ValueError(f"{where}: pos_embed {list(state['pos_embed'].shape)} is no sine-cosine table of a square clip")
    return positions if grid is None else positions | {
        "num_frames": grid[0] * tubelet_size, "image_size": grid[1] * fields["patch_size"]}


def _grid_of(table: Tensor) -> tuple[int, int, int] | None:
    """Time steps, rows, columns of a V-JEPA table [N, D]; None for another table."""
    # the first column is sin(time): 0 for the tokens of the first time step, 0.84 from then on
    later = (table[:, 0].abs() > 0.4).nonzero()
    frame = int(later[0]) if len(later) else len(table)
    side = math.isqrt(frame)
    if side * side != frame or len(table) % frame:
        return None
    grid = (len(table) // frame, side, side)
    # the moving average of a fixed table drifts by rounding
    return grid if torch.allclose(table.double(), sincos_3d(table.shape[1], grid), atol=1e-2) else None


def source_of(file: Foreign) -> str:
    return f"{file.path} ({FORMATS[file.format]}{f', {file.family}' if file.family else ''})"
