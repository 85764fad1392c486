"""Checkouts of Meta's code bases among the loaded modules: they are no packages, and all call themselves `src`."""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._block import BlockParts, gains, product_dtype, why_not_now
from ._report import PatchError, Report, modules_defining, modules_of_checkout


class CodeBase(NamedTuple):
    """What tells a code base: the names that one of its modules defines, and names that it does not have."""

    name: str                       # as in facebookresearch/<name>
    module: str                     # the one that defines them, as the checkout calls it
    defines: tuple[str, ...]
    lacks: tuple[str, ...] = ()

    def core_modules(self, among: Iterable[ModuleType] | None = None) -> list[ModuleType]:
        """The loaded modules (or those of `among`) that are this code base's."""
        found = modules_defining(*self.defines, among=among)
        return _unique(module for module in found if not any(name in vars(module) for name in self.lacks))

    def find(self, modules: ModuleType | Iterable[ModuleType] | None = None) -> list["Checkout"]:
        """Its checkouts: those with files beside `modules`, or all that are loaded. PatchError where there is none."""
        if modules is None:
            cores = self.core_modules()
        else:
            given = [modules] if isinstance(modules, ModuleType) else list(modules)
            cores = self.core_modules(other for module in given for other in modules_of_checkout(module))
        if not cores:
            where = "loaded" if modules is None else "in that checkout"
            raise PatchError(f"{self.name}: no module {where} defines {', '.join(self.defines)} as {self.module} does; "
                             f"import it first, or pass a module of the checkout as modules=")
        return [Checkout(core, _unique([core, *modules_of_checkout(core, self.module)])) for core in cores]

    def find_behind(self, model: nn.Module) -> list["Checkout"]:
        """Its checkouts that a model has parts of, with only those modules that define classes of the model's parts."""
        behind = namespaces(model)
        return [Checkout(core, [module for module in modules_of_checkout(core, self.module) if module in behind])
                for core in self.core_modules(behind)]


class Checkout(NamedTuple):
    """Loaded modules of one checkout, the one that tells it among them."""

    core: ModuleType
    modules: list[ModuleType]

    def definitions(self, name: str) -> list:
        """The classes or functions of this name that its modules define; several, where there are copies."""
        return [vars(module)[name] for module in modules_defining(name, among=self.modules)]

    def holders(self, name: str) -> list:
        """What its modules call by this name, each thing once, wherever it is defined."""
        return _unique(vars(module)[name] for module in self.modules if name in vars(module))

    def replace_function(self, report: Report, name: str, new: Callable) -> None:
        """Replace all copies of a function, each in every module that holds it."""
        for old in self.holders(name):
            if old is not new:
                report.replace_everywhere(old, new, self.modules)


def block_parts(block: nn.Module) -> BlockParts:
    """What Meta's vision-transformer blocks consist of; V-JEPA's have no stochastic depth."""
    attn, mlp, drop_path = block.attn, block.mlp, getattr(block, "drop_path", None)
    return BlockParts(block.norm1, (attn.qkv,), attn.proj, block.norm2, mlp.fc1, mlp.act, mlp.fc2, attn.num_heads,
                      drop_path, drop_path, (attn.attn_drop, attn.proj_drop, mlp.drop))


def why_not_block(block: nn.Module, x: Tensor, attention: type, mlp: type) -> str | None:
    """Why a block must run its own code on x; None where `run_block` computes the same, and faster."""
    if type(block.attn) is not attention or type(block.mlp) is not mlp:
        return f"its parts are {type(block.attn).__name__} and {type(block.mlp).__name__}"
    return why_not_now(block, block_parts(block), x) or ("it is slower" if is_slower(x) else None)


def is_slower(x: Tensor) -> bool:
    """Whether fused blocks were measured as slower than Meta's: on CPUs where they are small, and where not in float32.

    Others had 0.7 to 1.0 of the original's speed in inference and 0.7 to 1.3 in training (width 384, one core).
    """
    return x.device.type == "cpu" and (product_dtype(x) != torch.float32 or not gains(x))


ON_CPUS = ("on CPUs blocks are fused in float32 only, and where they are not small: else their own code is faster; GPUs: "
           "not measured")


def say_what_stays(report: Report, loop: str) -> None:
    """What is true of every patch of Meta's code; loop: where it trains."""
    report.keep(f"the loop of {loop}", "it is written inline; by hand: jepa_fast.ema_update_ for the target encoder's "
                "average, jepa_fast.AdamWEMA for the optimizer and the average in one pass over memory")
    report.note("fused blocks have first derivatives only: create_graph=True raises an error")


def namespaces(model: nn.Module) -> list[ModuleType]:
    """The loaded modules that define the classes of a model's parts: the very classes, whatever the modules are called."""
    classes = dict.fromkeys(type(part) for part in model.modules())
    return _unique(module for cls in classes for module in modules_defining(cls.__name__)
                   if vars(module)[cls.__name__] is cls)


def _unique(things: Iterable) -> list:
    return list({id(thing): thing for thing in things}.values())
