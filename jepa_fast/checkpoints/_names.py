"""Parameter names: wrappers' prefixes off, one project's names to another's, joined projections apart and together."""

import re

import torch
from torch import Tensor

State = dict[str, Tensor]

LEADING = ("module.", "backbone.")                       # data parallelism, V-JEPA's wrappers: in front of a name
ANYWHERE = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module)\.")  # compiled or sharded modules: at any depth
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
JOINED = {"qkv": ("q", "k", "v"), "kv": ("k", "v")}


def strip(state: State) -> State:
    """Names without the prefixes of wrappers. ValueError where two names become one."""
    out = {}
    for name, value in state.items():
        bare = ANYWHERE.sub("", name)
        while bare.startswith(LEADING):
            bare = bare.split(".", 1)[1]
        if bare in out:
            raise ValueError(f"{name}: two tensors are named {bare} once wrappers' prefixes are taken off")
        out[bare] = value
    return out


def rename(state: State, table: dict[str, str], where: str) -> State:
    """By a table of names of parameters or of modules, {n} for the number of a block. ValueError for a name not in it."""
    out = {}
    for name, value in state.items():
        template, numbers = NUMBER.sub("{n}", name), NUMBER.findall(name)
        module, _, leaf = template.rpartition(".")
        if template in table:
            new = table[template]
        elif module in table:
            new = f"{table[module]}.{leaf}"
        else:
            raise ValueError(f"{where} has no place for {name} {list(value.shape)}")
        for number in numbers:
            new = new.replace("{n}", number, 1)
        out[new] = value
    return out


def inverse(table: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


def split_joined(state: State) -> State:
    """attn.qkv [3 D, ...] as attn.q, attn.k, attn.v [D, ...]; xattn.kv as xattn.k, xattn.v. Copies."""
    out = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        parent, _, joined = module.rpartition(".")
        if joined in JOINED:
            parts = JOINED[joined]
            for part, piece in zip(parts, value.chunk(len(parts), 0), strict=True):
                out[f"{parent}.{part}.{kind}"] = piece.clone()
        else:
            out[name] = value
    return out


def join_split(state: State) -> State:
    """The inverse of `split_joined`: q, k, v of attn as attn.qkv, k, v of xattn as xattn.kv."""
    out = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        parent, _, part = module.rpartition(".")
        joined = {"attn": "qkv", "xattn": "kv"}.get(parent.rpartition(".")[2])
        if joined is None or part not in JOINED[joined]:
            out[name] = value
        elif part == JOINED[joined][0]:
            names = [f"{parent}.{other}.{kind}" for other in JOINED[joined]]
            missing = [other for other in names if other not in state]
            if missing:
                raise ValueError(f"{name} without {', '.join(missing)}")
            out[f"{parent}.{joined}.{kind}"] = torch.cat([state[other] for other in names])
    return out


def folded(names: list[str]) -> list[str]:
    """Names with the numbers of blocks folded: blocks.0-23.norm1.weight."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        template = NUMBER.sub("{n}", name, count=1)
        numbers.setdefault(template, []).extend(map(int, NUMBER.findall(name)[:1]))
    return [template.replace("{n}", _ranges(found), 1) for template, found in numbers.items()]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
