"""Cases for `crop_resize`."""

import torch
from torch import Tensor

from .. import ops
from ._spec import Case, OpSpec


def crop_resize(like: Tensor, **arguments) -> Tensor:
    """The op in the dtype of `like`, which is empty: pixels are bytes in every case."""
    return ops.crop_resize(**arguments, dtype=like.dtype)


def _boxes(g, sizes: Tensor, is_whole: bool) -> Tensor:
    """A box within each of the sizes [N, 2]."""
    lengths = (sizes * torch.rand(len(sizes), 2, generator=g).clamp(min=0.02)).clamp(min=0.3)
    starts = (sizes - lengths) * torch.rand(len(sizes), 2, generator=g)
    if is_whole:
        lengths = lengths.ceil()
        starts = torch.minimum(starts.floor(), sizes - lengths)
    return torch.cat([starts, lengths], dim=1)


def _case(name, B, C, size, N, view, *, layout="planar", is_whole=True, plain=False, is_large=False):
    """layout: "planar", "channels_last", "strided" or "packed", the last with images of different sizes."""
    def make(g):
        out = {"like": torch.empty(0), "size": view, "image_index": torch.randint(0, max(B, 1), (N,), generator=g)}
        if layout == "packed":
            sizes = torch.stack([torch.randint(1, side + 1, (B,), generator=g) for side in size], 1)
            ends = sizes.prod(1).cumsum(0)
            out["images"] = torch.randint(0, 256, (int(ends[-1]), C), generator=g, dtype=torch.uint8)
            out["layout"] = torch.cat([(ends - sizes.prod(1))[:, None], sizes], dim=1)
            sizes = sizes[out["image_index"]]
        else:
            images = torch.randint(0, 256, (B, C, *size), generator=g, dtype=torch.uint8)
            if layout == "channels_last":
                images = images.contiguous(memory_format=torch.channels_last)
            if layout == "strided":
                images = images.repeat_interleave(2, 3)[..., ::2]
            out["images"], sizes = images, torch.tensor(size).expand(N, 2)
        out["boxes"] = _boxes(g, sizes.float(), is_whole)
        if not plain:
            out |= {"flips": torch.rand(N, generator=g) < 0.5, "mean": torch.rand(C, generator=g),
                    "std": torch.rand(C, generator=g) + 0.2}
        return out

    return Case(name, make, is_large)


def _random_case(draw):
    B, C, N = draw(1, 3), draw(1, 3), draw(0, 2)
    size, view = (draw(1, 10), draw(1, 10)), (draw(1, 6), draw(1, 6))
    layout, is_whole, plain = ("planar", "channels_last", "strided", "packed")[draw(0, 3)], draw(0, 1) == 1, draw(0, 1) == 1
    return _case(f"fuzz-{B}-{C}-{N}-{size}-{view}-{layout}-{is_whole}-{plain}", B, C, size, N, view, layout=layout,
                 is_whole=is_whole, plain=plain)


_GATE = [_case("channels-last", 2, 3, (9, 9), 3, (70, 70), layout="channels_last"),
         _case("packed", 2, 3, (9, 9), 3, (8, 8), layout="packed", plain=True),
         _case("one", 1, 1, (1, 1), 1, (1, 1))]

SPECS = [OpSpec(
    function=crop_resize,
    ops=("crop_resize",),
    keep_dtype=("boxes", "mean", "std"),
    # weights are quotients of sums: a rounding or two beyond what the same product of matrices has
    floor=4.0,
    cases=[
        _case("empty", 2, 3, (8, 8), 0, (4, 4)),
        _case("one", 1, 1, (1, 1), 1, (1, 1), plain=True),
        _case("planar", 2, 3, (9, 11), 1, (5, 7)),
        _case("strided", 2, 2, (7, 6), 1, (3, 3), layout="strided"),
        _case("channels-last", 3, 3, (7, 8), 1, (9, 7), layout="channels_last"),
        _case("packed", 4, 2, (7, 9), 2, (6, 8), layout="packed"),
        _case("broken-boxes", 2, 1, (9, 8), 2, (4, 4), is_whole=False),
        _case("packed-broken-boxes", 3, 1, (9, 8), 2, (9, 3), layout="packed", is_whole=False, plain=True),
        _case("tiles", 1, 1, (17, 30), 1, (20, 70)),
        _case("imagenet-b2-96", 2, 3, (375, 500), 2, (96, 96), layout="packed", is_large=True),
    ],
    random_case=_random_case,
    gate={torch.float32: _GATE, torch.bfloat16: _GATE[:1]},
    bench=[_case("imagenet-b16-2x224", 16, 3, (375, 500), 32, (224, 224), layout="packed"),
           _case("imagenet-b16-8x96", 16, 3, (375, 500), 128, (96, 96), layout="packed")],
)]
