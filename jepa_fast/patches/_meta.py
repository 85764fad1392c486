"""Checkouts of Meta's code bases among the loaded modules: they are no packages, and all call themselves `src`."""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import NamedTuple

from torch import nn

from ._report import PatchError, Report, modules_defining, modules_of_checkout


class CodeBase(NamedTuple):
    """What tells a code base: the names that one of its modules defines, and names that it does not have."""

    name: str                       # as in facebookresearch/<name>
    module: str                     # where they are, in words, for messages
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
        return [Checkout(core, _unique([core, *modules_of_checkout(core)])) for core in cores]

    def find_behind(self, model: nn.Module) -> list["Checkout"]:
        """Its checkouts that a model has parts of, with only those modules that define classes of the model's parts."""
        behind = namespaces(model)
        return [Checkout(core, [module for module in modules_of_checkout(core) if module in behind])
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

    def replace_function(self, report: Report, name: str, new: Callable, check: Callable[[Callable], None]) -> None:
        """Replace all copies of a function, each in every module that holds it, once `check(copy)` has passed for all."""
        copies = [old for old in self.holders(name) if old is not new]
        for old in copies:
            check(old)
        for old in copies:
            report.replace_everywhere(old, new, self.modules)


def namespaces(model: nn.Module) -> list[ModuleType]:
    """The loaded modules that define the classes of a model's parts: the very classes, whatever the modules are called."""
    classes = dict.fromkeys(type(part) for part in model.modules())
    return _unique(module for cls in classes for module in modules_defining(cls.__name__)
                   if vars(module)[cls.__name__] is cls)


def _unique(things: Iterable) -> list:
    return list({id(thing): thing for thing in things}.values())
