"""The table of op specs: cases, error rule; shared by tests/ and bench/."""

import importlib
import pkgutil

from ._spec import (
    Case,
    OpSpec,
    assert_within_error_rule,
    cast,
    error,
    make,
    random_draw,
    record_calls,
    replace_function,
    run,
    run_three_ways,
)

# an op is covered the moment its file exists here
OPS: dict[str, OpSpec] = {
    spec.name: spec
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name) if not module.name.startswith("_")
    for spec in importlib.import_module(f"{__name__}.{module.name}").SPECS
}

__all__ = ["OPS", "Case", "OpSpec", "assert_within_error_rule", "cast", "error", "make", "random_draw",
           "record_calls", "replace_function", "run",
           "run_three_ways"]
