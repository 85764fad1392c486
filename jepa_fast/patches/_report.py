"""What a patch did, and the way back: every replacement goes through a `Report`, which can undo it."""

import contextlib
import functools
import inspect
import os
import pathlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

_ABSENT = object()
_PATCHED = "is patched already"


class PatchError(RuntimeError):
    """Foreign code is not what a patch was written for; nothing was replaced."""


@dataclass
class _Replacement:
    owner: object            # a module, a class, an instance or a dict
    name: str
    old: object              # _ABSENT: it was inherited
    new: object

    def current(self) -> object:
        return self._names().get(self.name, _ABSENT)

    def put_back(self) -> None:
        if isinstance(self.owner, dict):
            self.owner[self.name] = self.old
            if self.old is _ABSENT:
                del self.owner[self.name]
        elif self.old is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.old)

    def _names(self) -> dict:
        return self.owner if isinstance(self.owner, dict) else vars(self.owner)


@dataclass
class Report:
    """What was replaced in a code base, what was not and why; `print` it, `undo` it, or use it in a `with` statement."""

    patch: str
    replaced: dict[str, int] = field(default_factory=dict)    # what -> how many times
    kept: dict[str, str] = field(default_factory=dict)        # what runs as it did -> why
    notes: list[str] = field(default_factory=list)            # where results differ from the original on purpose
    _replacements: list[_Replacement] = field(default_factory=list, repr=False)

    @classmethod
    @contextlib.contextmanager
    def of(cls, patch: str) -> Iterator["Report"]:
        """A report to fill; whatever goes wrong while it is filled, nothing stays replaced."""
        report = cls(patch)
        try:
            yield report
        except BaseException:
            report.undo()
            raise

    def replace(self, owner: object, name: str, new: object, what: str | None = None) -> None:
        """Set an attribute of a module, class or instance, or an entry of a dict."""
        names = owner if isinstance(owner, dict) else vars(owner)
        old = names.get(name, _ABSENT)
        self._replacements.append(_Replacement(owner, name, old, new))
        if isinstance(owner, dict):
            owner[name] = new
        else:
            setattr(owner, name, new)
        what = what or f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
        self.replaced[what] = self.replaced.get(what, 0) + 1

    def replace_method(self, cls: type, name: str, fast: Callable, model: nn.Module | None = None) -> None:
        """Let `fast(original, self, ...)` answer cls.name: of the class, or of the instances inside `model` only.

        original(self, ...) is the class's own method. Instances keep their class, their state-dict and their hooks.
        """
        original, what = getattr(cls, name), f"{cls.__name__}.{name}"
        if getattr(original, "is_of_jepa_fast", False):
            self.keep(what, _PATCHED)
            return

        def method(self, *args, **kwargs):
            return fast(original, self, *args, **kwargs)

        # torch.jit.script compiles the original's source, and looks names up in the globals of the function
        method = functools.wraps(original)(types.FunctionType(method.__code__, original.__globals__, name, None,
                                                              method.__closure__))
        method.is_of_jepa_fast = True
        if model is None:
            self.replace(cls, name, method, what)
            return
        for module in model.modules():
            if getattr(type(module), name, None) is not original:  # a subclass with its own is left alone
                continue
            if getattr(vars(module).get(name), "is_of_jepa_fast", False):
                self.keep(what, _PATCHED)
            elif has_own(module, name):
                self.keep(what, "has been replaced in the instance already")
            else:
                self.replace(module, name, types.MethodType(method, module), what)

    def replace_everywhere(self, old: Callable, new: Callable, modules: Iterable[types.ModuleType]) -> None:
        """Replace a function in every module that holds it: where it is defined, and where it was imported to."""
        for module in modules:
            for name in [name for name, value in vars(module).items() if value is old]:
                self.replace(module, name, new, old.__qualname__)

    def keep(self, what: str, why: str) -> None:
        """Say that something runs as it did."""
        self.kept[what] = why

    def note(self, text: str) -> None:
        """Say where results are not the original's, or what a user has to do."""
        if text not in self.notes:
            self.notes.append(text)

    def take(self, other: "Report") -> None:
        """Make another report a part of this one."""
        for what, count in other.replaced.items():
            self.replaced[what] = self.replaced.get(what, 0) + count
        self.kept |= {what: why for what, why in other.kept.items() if why != _PATCHED or what not in self.replaced}
        self.notes += [note for note in other.notes if note not in self.notes]
        self._replacements += other._replacements
        other._replacements = []

    def undo(self) -> None:
        """Put everything back, the very objects. RuntimeError, and nothing done, where something was replaced since."""
        for replacement in self._replacements:
            if replacement.current() is not replacement.new:
                raise RuntimeError(f"{self.patch}: {replacement.name} of {replacement.owner!r:.80} was replaced again by "
                                   f"something else; undo that first")
        for replacement in reversed(self._replacements):
            replacement.put_back()
        self._replacements = []

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{self.patch}: {'replaced' if self.replaced else 'nothing replaced'}"]
        lines += [f"  {what}" + (f" in {count} places" if count > 1 else "") for what, count in self.replaced.items()]
        for title, rows in (("not replaced", [f"{what}: {why}" for what, why in self.kept.items()]), ("note", self.notes)):
            if rows:
                lines += [title, *(f"  {row}" for row in rows)]
        return "\n".join(lines)


def has_own(module: nn.Module, name: str) -> bool:
    """Whether a method of an instance is another than its class's."""
    own = vars(module).get(name)
    return own is not None and getattr(own, "__func__", None) is not getattr(type(module), name)


def check_signature(function: Callable, expected: Callable, where: str, least: int | None = None) -> None:
    """Refuse a function whose parameters (kinds, names, defaults) are not those of the lambda `expected`.

    least: so many of them, the first, are enough.
    """
    found, wanted = ([(p.kind, p.name, p.default) for p in inspect.signature(f).parameters.values()]
                     for f in (function, expected))
    if found != wanted and not (least and len(found) >= least and found == wanted[:len(found)]):
        raise PatchError(f"{where} must take {inspect.signature(expected)} for this patch, takes "
                         f"{inspect.signature(function)}: another version of that code; nothing was replaced")


def modules_of_package(name: str) -> list[types.ModuleType]:
    """The loaded modules of an installed package."""
    return [module for key, module in list(sys.modules.items())
            if isinstance(module, types.ModuleType) and (key == name or key.startswith(f"{name}."))]


def modules_defining(*names: str, among: Iterable[types.ModuleType] | None = None) -> list[types.ModuleType]:
    """Loaded modules (or those of `among`) that define all these classes and functions themselves."""
    candidates = list(sys.modules.values()) if among is None else list(among)
    return [module for module in candidates if isinstance(module, types.ModuleType)
            and all(getattr(vars(module).get(name), "__module__", None) == module.__name__ for name in names)]


def modules_of_checkout(module: types.ModuleType, name: str | None = None) -> list[types.ModuleType]:
    """The loaded modules whose files lie in the same checkout: beside or below the folder that `module` is imported from.

    name: what the module is called there; it may have been imported as a part of something larger, `mine.src.models`.
    """
    depth = min(full.count(".") for full in (module.__name__, name or module.__name__))
    root = pathlib.Path(os.path.abspath(module.__file__)).parents[depth]
    return [other for other in list(sys.modules.values())
            if isinstance(other, types.ModuleType) and isinstance(getattr(other, "__file__", None), str)
            and os.path.abspath(other.__file__).startswith(f"{root}{os.sep}")]


def modules_behind(model: nn.Module) -> list[types.ModuleType]:
    """The loaded modules that define the classes of a model's parts."""
    names = dict.fromkeys(type(part).__module__ for part in model.modules())
    return [sys.modules[name] for name in names if name in sys.modules]
