"""Shared set-up of the tests."""

import torch

if torch.version.cuda is None:
    # torchvision on PyPI is linked to CUDA and fails on a CPU build of torch over two schemas; its Python parts work
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _torchvision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
