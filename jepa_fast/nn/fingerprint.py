"""Which weights a module has, as a short text."""

import hashlib

import torch
from torch import nn


def fingerprint(module: nn.Module, *settings: object) -> str:
    """SHA-256 over `settings` and names, shapes, dtypes and bytes of the state dict, 16 hexadecimal digits. Reads all
    weights."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {list(value.shape)} {value.dtype};".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
