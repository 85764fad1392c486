"""Shared set-up of the tests: without a GPU, Triton kernels run under Triton's interpreter."""

import importlib.util
import os
import pathlib

import pytest
import torch

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
    import triton_interpreter

    triton_interpreter.install()

if torch.version.cuda is None:
    # torchvision on PyPI is linked to CUDA and fails on a CPU build of torch over two schemas; its Python parts work
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _torchvision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

if not torch.cuda.is_available():
    import cuda_host

    if cuda_host.compiler():
        cuda_host.install()


def pytest_report_header() -> str | None:
    if not torch.cuda.is_available() and not cuda_host.compiler():
        return "csrc/cuda is not tested: no C++ compiler to build it for the host"
    return None


def pytest_addoption(parser) -> None:
    parser.addoption("--upstream", action="append", default=[], metavar="NAME=PATH",
                     help="a checkout of an official repository (ijepa, jepa, vjepa2, lejepa) to compare with; repeat")


@pytest.fixture
def upstream(request):
    """name -> the folder of that checkout; skips where --upstream does not name it."""
    given = dict(pair.partition("=")[::2] for pair in request.config.getoption("--upstream"))

    def path_of(name: str) -> pathlib.Path:
        if name not in given:
            pytest.skip(f"needs --upstream {name}=PATH")
        return pathlib.Path(given[name])
    return path_of
