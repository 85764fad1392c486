"""Replacing foreign functions and methods, and putting them back."""

import types

import pytest
import torch
from torch import nn

from jepa_fast import patches
from jepa_fast.patches._report import PatchError, Report, check_signature, modules_defining


class Doubles(nn.Module):
    def forward(self, x):
        return 2 * x


def triples(original, self, x):
    return original(self, x) + x


def test_a_method_of_a_class_and_back():
    original = Doubles.forward
    with Report.of("test") as report:
        report.replace_method(Doubles, "forward", triples)
    assert Doubles()(torch.ones(1)) == 3
    assert Doubles.forward.__name__ == "forward"
    report.undo()
    assert Doubles.forward is original
    report.undo()  # nothing left to do


def test_a_method_of_a_model_only():
    model, other = nn.Sequential(Doubles(), nn.Sequential(Doubles())), Doubles()
    hooked = []
    model[0].register_forward_hook(lambda *_: hooked.append(1))
    with Report.of("test") as report:
        report.replace_method(Doubles, "forward", triples, model)
    assert report.replaced == {"Doubles.forward": 2}
    assert model(torch.ones(1)) == 9 and other(torch.ones(1)) == 2 and hooked == [1]
    report.undo()
    assert model(torch.ones(1)) == 4 and "forward" not in vars(model[0])


def test_an_instance_with_a_forward_of_its_own_keeps_it():
    model = Doubles()
    model.forward = lambda x: x
    with Report.of("test") as report:
        report.replace_method(Doubles, "forward", triples, model)
    assert model(torch.ones(1)) == 1 and not report.replaced
    assert report.kept == {"Doubles.forward": "has been replaced in the instance already"}


def test_a_class_is_patched_once():
    with Report.of("first") as first, Report.of("second") as second:
        first.replace_method(Doubles, "forward", triples)
        second.replace_method(Doubles, "forward", triples)
    assert second.kept == {"Doubles.forward": "is patched already"}
    assert Doubles()(torch.ones(1)) == 3
    first.undo()


def test_every_namespace_that_holds_a_function():
    def old(): ...
    def new(): ...
    a, b = types.ModuleType("a"), types.ModuleType("b")
    a.f, b.also_f, b.g = old, old, new
    with Report.of("test") as report:
        report.replace_everywhere(old, new, [a, b])
    assert a.f is new and b.also_f is new
    report.undo()
    assert a.f is old and b.also_f is old and b.g is new


def test_nothing_stays_replaced_where_patching_fails():
    original = Doubles.forward
    with pytest.raises(PatchError), Report.of("test") as report:
        report.replace_method(Doubles, "forward", triples)
        raise PatchError
    assert Doubles.forward is original


def test_undo_refuses_what_was_replaced_since():
    table = {"f": 1}
    with Report.of("test") as report:
        report.replace(table, "f", 2)
        report.replace(table, "g", 3)
    table["f"] = 5
    with pytest.raises(RuntimeError, match="f of .* was replaced again"):
        report.undo()
    assert table == {"f": 5, "g": 3}
    table["f"] = 2
    report.undo()
    assert table == {"f": 1}


def test_what_a_report_says():
    with Report.of("test") as report:
        report.replace({}, "f", 1, "f of a dict")
        report.keep("g", "it is as fast")
        report.note("h differs")
        report.note("h differs")
    assert str(report) == "test: replaced\n  f of a dict\nnot replaced\n  g: it is as fast\nnote\n  h differs"


@pytest.mark.parametrize("expected", [lambda self, y: 0, lambda self: 0, lambda self, x, z=1: 0, lambda self, x=1: 0,
                                      lambda self, *, x: 0], ids=["name", "fewer", "more", "default", "kind"])
def test_another_signature_is_refused(expected):
    with pytest.raises(PatchError, match="Doubles.forward must take .* takes .self, x.*another version"):
        check_signature(Doubles.forward, expected, "Doubles.forward")


def test_the_expected_signature():
    check_signature(Doubles.forward, lambda self, x: 0, "Doubles.forward")
    check_signature(lambda a, *b, c=2, **d: None, lambda a, *b, c=2, **d: 0, "a lambda")


def test_modules_that_define_names():
    found = modules_defining("Doubles", "triples")
    assert [module.__name__ for module in found] == [__name__]
    assert not modules_defining("Report", "Doubles")


def test_auto_needs_parts_that_it_knows():
    with pytest.raises(ValueError, match="must have parts that a patch knows .* got a .*Doubles"):
        patches.auto(Doubles())
