"""Read a checkpoint of any kind; its contents say which."""

import json
import pathlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..train.checkpoint import FORMAT as OURS  # also in config.json beside our safetensors
from ..train.checkpoint import load as load_run
from . import hf_ijepa, hf_vjepa2, official
from ._names import State, strip
from .released import released

EXPECTED = ("an official I-JEPA, V-JEPA, V-JEPA 2, 2-AC or 2.1 file, a run folder or its checkpoints/last.pt, a Hugging "
            "Face folder or file, safetensors of ours")
FORMATS = {"official": "an official file", "run": "a run of ours", "hf": "Hugging Face", "safetensors": "our safetensors",
           "weights": "weights alone"}


@dataclass(frozen=True)
class Foreign:
    """A checkpoint read: weights by role under the official names, which are ours, and what else was there."""

    path: str
    format: str                                         # a key of FORMATS
    family: str | None                                  # a key of official.PREFIXES; None: of no published model
    roles: dict[str, State]                             # encoder, predictor, target_encoder, ema_encoder, probe, ...
    config: dict[str, dict] = field(default_factory=dict)  # role -> fields of its config, where the file says them
    other: dict = field(default_factory=dict)           # epoch, loss, opt, recipe, step, ...

    def role(self, name: str) -> State:
        if name not in self.roles:
            raise ValueError(f"{self.path} has no {name}; it holds {', '.join(self.roles)}")
        return self.roles[name]

    def fields(self, role: str) -> dict:
        """What the file says of a role's config: every encoder has the same."""
        return self.config.get("encoder" if role in official.ENCODERS else role, {})


def read(path: str | pathlib.Path, *, family: str | None = None) -> Foreign:
    """Read a file or a folder on the CPU (memory-mapped, tensors and plain containers only).

    `family` decides where the contents do not. ValueError says what was seen and what was expected.
    """
    path = pathlib.Path(path)
    if family is not None and family not in official.PREFIXES:
        raise ValueError(f"family must be one of {', '.join(official.PREFIXES)}, got {family!r}")
    if path.is_dir():
        format, roles, config, other = _folder(path)
    elif not path.is_file():
        raise ValueError(_absent(path))
    elif path.suffix == ".safetensors":
        format, roles, config, other = _tensors(path, _load_safetensors(path))
        said = _metadata(path).get("family")
        family = family or (said if said in official.PREFIXES else None)
    else:
        format, roles, config, other = _pickled(path)
    try:
        return Foreign(str(path), format, family or official.family_of(roles), roles, config, other)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


Parts = tuple[str, dict[str, State], dict[str, dict], dict]


def _folder(path: pathlib.Path) -> Parts:
    if (path / "checkpoints" / "last.pt").exists():
        path = path / "checkpoints" / "last.pt"
    if path.is_file():
        return _pickled(path)
    if (path / "run.json").is_file():
        return _of_run(load_run(path))
    config_path = path / "config.json"
    if not config_path.is_file():
        names = sorted(item.name for item in path.iterdir())[:8]
        raise ValueError(f"{path} holds {', '.join(names) or 'nothing'}; expected {EXPECTED}")
    config = _json(config_path)
    if config.get("format") == OURS:
        roles = {role: _load_safetensors(path / f"{role}.safetensors") for role in config["roles"]}
        return "safetensors", roles, config["config"], {}
    reader = {"ijepa": hf_ijepa, "vjepa2": hf_vjepa2}.get(config.get("model_type"))
    if reader is None:
        raise ValueError(f"{config_path} is of model_type {config.get('model_type')!r}; expected ijepa or vjepa2")
    return "hf", reader.from_hf(_hf_weights(path)), reader.config_from_hf(config), {}


def _hf_weights(path: pathlib.Path) -> State:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(_json(index)["weight_map"].values()))
    else:
        shards = ["model.safetensors"] if (path / "model.safetensors").is_file() else []
    if shards:
        return {name: value for shard in shards for name, value in _load_safetensors(path / shard).items()}
    if (path / "pytorch_model.bin").is_file():
        return _torch_load(path / "pytorch_model.bin")
    raise ValueError(f"{path} has a config.json and no weights: expected model.safetensors, its shards or pytorch_model.bin")


def _pickled(path: pathlib.Path) -> Parts:
    file = _torch_load(path)
    if not isinstance(file, Mapping):
        raise ValueError(f"{path} holds a {type(file).__name__}; expected {EXPECTED}")
    if file.get("format") == OURS and "objective" in file:
        return _of_run(file)
    if any(isinstance(file.get(role), Mapping) for role in official.ROLES):
        roles, other = official.unpack(dict(file))
        return "official", roles, {}, other
    if isinstance(file.get("classifiers"), list) and file["classifiers"]:
        # several probes trained at once: the first; its file does not say which was best
        other = {key: value for key, value in file.items() if key != "classifiers"}
        return "official", {"probe": strip(file["classifiers"][0])}, {}, other
    if file and all(isinstance(value, Tensor) for value in file.values()):
        return _tensors(path, dict(file))
    raise ValueError(f"{path} holds {', '.join(map(str, list(file)[:8]))}; expected {EXPECTED}")


def _of_run(file: Mapping) -> Parts:
    recipe = yaml.safe_load(file["recipe"]) if file.get("recipe") else {}
    config = {role: fields for role, fields in recipe.get("objective", {}).items() if isinstance(fields, dict)}
    rest = {key: value for key, value in file.items() if key not in ("format", "objective", "optimizer")}
    return "run", official.roles_of(file["objective"]), config, rest | {"opt": file.get("optimizer")}


def _tensors(path: pathlib.Path, state: State) -> Parts:
    """A state dict alone, of whatever module."""
    state = strip(state)
    for reader in (hf_ijepa, hf_vjepa2):
        if reader.is_ours(state):
            config = path.with_name("config.json")
            fields = reader.config_from_hf(_json(config)) if config.is_file() else {}
            return "hf", reader.from_hf(state), fields, {}
    if path.suffix == ".safetensors" and "role" in _metadata(path):
        config = path.with_name("config.json")
        fields = _json(config)["config"] if config.is_file() else {}
        return "safetensors", {_metadata(path)["role"]: state}, fields, {}
    if "patch_embed.proj.weight" in state:
        return "weights", {"encoder": state}, {}, {}
    if "predictor_embed.weight" in state or "predictor_embed.0.weight" in state:
        return "weights", {"predictor": state}, {}, {}
    if any(name.startswith("encoder.patch_embed.") for name in state):
        return "weights", official.roles_of(state), {}, {}
    raise ValueError(f"{path} holds tensors named {', '.join(list(state)[:5])}, ...; expected {EXPECTED}")


def _torch_load(path: pathlib.Path):
    try:
        # files older than torch's zip layout cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from error


def _load_safetensors(path: pathlib.Path) -> State:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {str(error).splitlines()[0]}") from error


def _json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _metadata(path: pathlib.Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _absent(path: pathlib.Path) -> str:
    known = released().get(path.name)
    if known is None:
        return f"no file or folder {path}; expected {EXPECTED}"
    return f"no file {path}; the released one ({known.model}) is at {known.url}"
