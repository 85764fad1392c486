"""Recipes: one file per paper; each public function in them returns a complete Recipe and is found by its name."""

import difflib
import importlib
import pathlib
import pkgutil
from collections.abc import Callable

import yaml

from ._recipe import OptimConfig, Recipe, TrainConfig, merge, save, to_yaml, with_image_source


def all_recipes() -> dict[str, Callable[[], Recipe]]:
    """name -> function, from every module of this folder."""
    found = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{info.name}")
            found |= {name: getattr(module, name) for name in module.__all__}
    return found


def get_recipe(name: str) -> Recipe:
    recipes = all_recipes()
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=3, cutoff=0.3) or sorted(recipes)
        raise ValueError(f"unknown recipe {name!r}; nearest: {', '.join(near)} (jepa-fast recipes lists all)")
    return recipes[name]()


def load(path: pathlib.Path) -> Recipe:
    """Read a saved recipe.yaml. ValueError names the file and the field that is wrong."""
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict) or "name" not in values:
        raise ValueError(f"{path} is not a recipe: no field `name`")
    return merge(get_recipe(values["name"]), values, str(path))


__all__ = ["OptimConfig", "Recipe", "TrainConfig", "all_recipes", "get_recipe", "load", "save", "to_yaml",
           "with_image_source"]
