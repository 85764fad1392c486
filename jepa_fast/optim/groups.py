"""Which parameters decay."""

from collections.abc import Iterable, Mapping

from torch import nn


def param_groups(roles: nn.Module | Iterable[nn.Module] | Mapping[str, nn.Module], weight_decay: float) -> list[dict]:
    """One group of weights per module, then one of biases and one-dimensional parameters per module, without decay.

    For an encoder and a predictor these are the official four groups of I-JEPA and V-JEPA, in their order, so that
    optimizer states of official checkpoints fit. A parameter counts as a bias where its name contains "bias". Mask
    tokens and patch embeddings decay. Frozen parameters are kept: they get no state but occupy their index.
    Groups without decay carry `WD_exclude`, the official mark that tells a weight-decay schedule to pass by.
    """
    if isinstance(roles, nn.Module):
        roles = [roles]
    modules = list(roles.values() if isinstance(roles, Mapping) else roles)

    def params(module: nn.Module, is_bias: bool) -> list[nn.Parameter]:
        return [p for name, p in module.named_parameters() if ("bias" in name or p.dim() == 1) == is_bias]

    return ([{"params": params(module, False), "weight_decay": weight_decay} for module in modules]
            + [{"params": params(module, True), "weight_decay": 0.0, "WD_exclude": True} for module in modules])
