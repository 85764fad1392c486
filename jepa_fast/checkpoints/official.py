"""Files of the official repositories: I-JEPA, V-JEPA, V-JEPA 2, V-JEPA 2-AC, V-JEPA 2.1.

One layout in all generations: torch.save of a dict {encoder, predictor, target_encoder, opt, scaler, epoch, loss,
batch_size, world_size, lr}. Released V-JEPA 2-AC has encoder and predictor; distilled V-JEPA 2.1 has ema_encoder in place of
target_encoder. Our modules carry the official parameter names; files add the prefixes of wrappers. The optimizer
numbers parameters as the four groups list them: weights of encoder and predictor, then their biases and one-dimensional
parameters, frozen tables counted.
"""

import pathlib
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ._names import State, strip
from ._write import whole

ROLES = ("encoder", "predictor", "target_encoder", "ema_encoder")
ENCODERS = ("encoder", "target_encoder", "ema_encoder")
TRAINED = ("encoder", "predictor")  # by the official optimizer, in its order
PREFIXES = {"ijepa": "module.", "vjepa": "module.backbone.", "vjepa2": "module.backbone.", "vjepa2_ac": "module.",
            "vjepa2_1": "module.backbone."}
SCALARS = {"scaler": None, "epoch": 0, "loss": 0.0, "batch_size": 0, "world_size": 1, "lr": 0.0}


def family_of(roles: Mapping[str, State]) -> str | None:
    """Which generation a file is of, by its tensors: a key of PREFIXES; None where it is of none of them.

    Raises ValueError where a V-JEPA and a V-JEPA 2 encoder look alike.
    """
    encoder = next((roles[role] for role in ENCODERS if role in roles), {})
    predictor = roles.get("predictor", {})
    if any(name.startswith(("norms_block.", "patch_embed_img.", "img_mod_embed")) for name in [*encoder, *predictor]):
        return "vjepa2_1"
    if "action_encoder.weight" in predictor:
        return "vjepa2_ac"
    num_mask_tokens = sum(name.startswith("mask_tokens.") for name in predictor)
    if not encoder:
        return "ijepa" if "mask_token" in predictor else _of_video_predictor(predictor, num_mask_tokens)
    stem = encoder.get("patch_embed.proj.weight")
    if stem is None or "cls_token" in encoder or "norm.weight" not in encoder:
        return None
    if stem.dim() == 4:
        return "ijepa" if "pos_embed" in encoder else None
    if "pos_embed" not in encoder:
        return "vjepa2"
    if not predictor:
        raise ValueError("a video encoder with pos_embed and no predictor beside it is of V-JEPA, or of V-JEPA 2, whose "
                         "released files hold a table that is not used: pass family='vjepa' or 'vjepa2'")
    return _of_video_predictor(predictor, num_mask_tokens)


def _of_video_predictor(predictor: State, num_mask_tokens: int) -> str | None:
    # released V-JEPA 2 predictors hold an unused table and 10 mask tokens, V-JEPA's a table and one per kind of mask
    if not num_mask_tokens:
        return None
    return "vjepa" if "predictor_pos_embed" in predictor and num_mask_tokens <= 2 else "vjepa2"


def pack(roles: Mapping[str, State], family: str, optimizer: dict | None = None, **scalars) -> dict:
    """What the official loaders of a generation read; `scalars` are epoch, loss, batch_size, world_size, lr, scaler."""
    unknown = scalars.keys() - SCALARS.keys()
    if family not in PREFIXES or unknown:
        raise ValueError(f"an official file is of one of {', '.join(PREFIXES)} and holds {', '.join(SCALARS)}, "
                         f"got {family} and {', '.join(sorted(unknown)) or 'nothing else'}")
    prefixed = {role: {PREFIXES[family] + name: value for name, value in roles[role].items()}
                for role in ROLES if role in roles}
    return prefixed | {"opt": optimizer} | SCALARS | scalars


def unpack(file: dict) -> tuple[dict[str, State], dict]:
    """(roles with bare names, the other entries) of an official file."""
    roles = {role: strip(file[role]) for role in ROLES if isinstance(file.get(role), Mapping)}
    return roles, {key: value for key, value in file.items() if key not in roles}


def roles_of(objective: State) -> dict[str, State]:
    """The state dict of an objective, by role: what its names begin with. The target encoder's wrapper is taken off.

    Parameters of the objective itself are of the role "objective".
    """
    roles: dict[str, State] = {}
    for name, value in objective.items():
        role, _, rest = name.partition(".") if "." in name else ("objective", ".", name)
        if role == "target_encoder":
            rest = rest.removeprefix("encoder.")
        roles.setdefault(role, {})[rest] = value
    return roles


def objective_of(roles: Mapping[str, State]) -> State:
    """The inverse of `roles_of`."""
    prefix = {"target_encoder": "target_encoder.encoder.", "objective": ""}
    return {prefix.get(role, f"{role}.") + name: value for role, state in roles.items() for name, value in state.items()}


def optimizer_groups(roles: Iterable[str]) -> list[tuple[bool, str]]:
    """(holds biases, role) of the official groups."""
    roles = list(roles)
    return [(is_bias, role) for is_bias in (False, True) for role in roles]


def optimizer_names(roles: Mapping[str, State]) -> list[list[str]]:
    """Names "role.parameter" of each group, in the order of a file's or a module's state dicts."""
    return [[f"{role}.{name}" for name, value in roles[role].items() if ("bias" in name or value.dim() == 1) == is_bias]
            for is_bias, role in optimizer_groups(roles)]


def renumbered(optimizer: dict, theirs: list[list[str]], ours: list[list[str]]) -> dict[int, dict]:
    """`optimizer["state"]` for parameters in our order; those that only they have must be without state (tables)."""
    sizes = [len(group["params"]) for group in optimizer["param_groups"]]
    if sizes != [len(group) for group in theirs]:
        raise ValueError(f"opt must have groups of {[len(group) for group in theirs]} parameters, as the file's encoder and "
                         f"predictor have, got {sizes}")
    number = {name: i for i, name in enumerate(name for group in ours for name in group)}
    out = {}
    for i, name in enumerate(name for group in theirs for name in group):
        if i not in optimizer["state"]:
            continue
        if name not in number:
            raise ValueError(f"opt has a state for {name}, which does not train in the model")
        out[number[name]] = optimizer["state"][i]
    return out


def official_optimizer(optimizer: dict, roles: Mapping[str, State]) -> dict:
    """The optimizer of a run as official files number it: with encoder and predictor.

    V-JEPA 2-AC trains the predictor alone; officially the encoder has groups all the same, without state.
    """
    in_file = {role: roles[role] for role in TRAINED if role in roles}
    theirs, sizes = optimizer_names(in_file), [len(group["params"]) for group in optimizer["param_groups"]]
    for trained in (in_file, {"predictor": in_file.get("predictor", {})}):
        ours = optimizer_names(trained)
        if [len(names) for names in ours] == sizes:
            break
    else:
        raise ValueError(f"opt must have groups of {[len(names) for names in theirs]} parameters, as encoder and predictor "
                         f"have, got {sizes}")
    settings, groups, start = dict(zip(optimizer_groups(trained), optimizer["param_groups"], strict=True)), [], 0
    for (is_bias, role), names in zip(optimizer_groups(in_file), theirs, strict=True):
        group = settings[(is_bias, role) if role in trained else (is_bias, "predictor")]
        groups.append(group | {"params": list(range(start, start + len(names)))})
        start += len(names)
    return {"state": renumbered(optimizer, ours, theirs), "param_groups": groups}


def save_official(path: str | pathlib.Path, objective: nn.Module, optimizer: torch.optim.Optimizer | None = None, *,
                  force: bool = True, **scalars) -> None:
    """Write an objective as the official loader of its generation reads it, atomically; `scalars` as `pack` takes them."""
    roles = {role: state for role, state in roles_of(objective.state_dict()).items() if role in ROLES}
    state = None if optimizer is None else official_optimizer(optimizer.state_dict(), roles)
    file = pack(roles, family_of(roles) or "", state, **scalars)
    with whole(pathlib.Path(path), force=force) as temporary:
        torch.save(file, temporary)
