"""Patches against the convolution and the unfold that they replace; any strides; float16; bad input."""

import re

import pytest
import torch
import torch.nn.functional as F

from jepa_fast import ops, testing
from jepa_fast.ops import gather_patches, scatter_patches

BACKENDS = testing.OPS["gather_patches"].backends()
NO_FLOAT64 = ("triton", "cuda")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def draw(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def visible(B, N, K, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N, generator=generator)[:K] for _ in range(B)])


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gather_equals_unfold(backend, dtype, channels_last):
    if dtype == torch.float64 and backend in NO_FLOAT64:
        pytest.skip(f"{backend} has no float64 version")
    pixels = draw((3, 3, 32, 48)).to(dtype)
    if channels_last:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    unfolded = F.unfold(pixels.double(), 8, stride=8).mT.to(dtype)  # [B, N, C * p * p]
    index = visible(3, 24, 10)
    rows = index + 24 * torch.arange(3).unsqueeze(1)
    expected = torch.gather(unfolded, 1, index.unsqueeze(-1).expand(-1, -1, 192))
    assert torch.equal(gather_patches(pixels, index, (8, 8)), expected)
    assert torch.equal(gather_patches(pixels, rows.flatten(), (8, 8)), expected.flatten(0, 1))
    assert torch.equal(gather_patches(pixels, None, (8, 8)), unfolded)


@pytest.mark.parametrize("view", ["cropped", "flipped-axes", "every-second", "expanded"])
def test_any_strides_are_read_in_place(backend, view):
    pixels = {
        "cropped": lambda: draw((2, 3, 40, 50))[:, :, 3:35, 7:39],
        "flipped-axes": lambda: draw((2, 3, 32, 32)).mT,
        "every-second": lambda: draw((2, 6, 64, 64))[:, ::2, ::2, ::2],
        "expanded": lambda: draw((1, 1, 32, 32)).expand(2, 3, 32, 32),
    }[view]()
    index = visible(2, 16, 5)
    expected = gather_patches(pixels.clone(memory_format=torch.contiguous_format), index, (8, 8))
    assert torch.equal(gather_patches(pixels, index, (8, 8)), expected)


CONVOLUTIONS = [
    pytest.param((2, 3, 64, 48), (16, 16), F.conv2d, id="image"),
    pytest.param((2, 3, 37, 50), (7, 9), F.conv2d, id="image-remainder"),
    pytest.param((2, 3, 6, 32, 48), (2, 16, 16), F.conv3d, id="clip"),
    pytest.param((2, 2, 5, 13, 17), (2, 5, 4), F.conv3d, id="clip-remainder"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape, patch_size, convolution", CONVOLUTIONS)
def test_linear_of_patches_is_the_convolution(backend, shape, patch_size, convolution, dtype):
    """Outputs and gradients to pixels, weight and bias, within twice the convolution's own error."""
    pixels, weight, bias = draw(shape), draw((24, shape[1], *patch_size), 2), draw((24,), 3)
    grid = [size // patch for size, patch in zip(shape[2:], patch_size, strict=True)]
    index = visible(shape[0], torch.Size(grid).numel(), 5)
    upstream, rounded = draw((shape[0], 5, 24), 4), dtype

    def embed_all(pixels, weight, bias):
        tokens = convolution(pixels, weight, bias, stride=patch_size).flatten(2).mT
        return torch.gather(tokens, 1, index.unsqueeze(-1).expand(-1, -1, 24))

    def embed_visible(pixels, weight, bias):
        return F.linear(gather_patches(pixels, index, patch_size), weight.flatten(1), bias)

    def values(embed, dtype):  # of the same rounded numbers
        inputs = [t.to(rounded).to(dtype).requires_grad_() for t in (pixels, weight, bias)]
        out = embed(*inputs)
        grads = torch.autograd.grad(out, inputs, upstream.to(rounded).to(dtype))
        return dict(zip(("out", "pixels", "weight", "bias"), (out.detach(), *grads), strict=True))

    plain, exact = values(embed_all, dtype), values(embed_all, torch.float64)
    testing.assert_within_error_rule(values(embed_visible, dtype), plain, exact)


def test_scatter_is_the_adjoint(backend):
    """<gather(x), y> = <x, scatter(y)> for any x, y, repeated patches included: exact in small integers."""
    pixels, index = draw((2, 3, 20, 24)).mul(4).round(), torch.tensor([[0, 3, 3, 11], [7, 7, 7, 2]])
    patches = draw((2, 4, 3 * 6 * 5), 1).mul(4).round()
    left = (gather_patches(pixels, index, (6, 5)) * patches).sum()
    right = (pixels * scatter_patches(patches, index, pixels.shape, (6, 5))).sum()
    assert torch.equal(left, right)


def test_scatter_of_all_patches_restores_the_pixels(backend):
    pixels = draw((2, 3, 21, 26))
    patches = gather_patches(pixels, None, (4, 5))
    expected = pixels.clone()
    expected[:, :, 20:] = 0  # beyond the last whole patch
    expected[:, :, :, 25:] = 0
    assert torch.equal(scatter_patches(patches, None, pixels.shape, (4, 5)), expected)


def test_hidden_patches_are_not_read(backend):
    """NaN in a patch that is not named reaches neither the output nor the gradient."""
    pixels = torch.full((1, 3, 32, 32), float("nan"))
    pixels[:, :, 16:, :16] = draw((1, 3, 16, 16))
    pixels.requires_grad_()
    out = gather_patches(pixels, torch.tensor([[2]]), (16, 16))
    (grad,) = torch.autograd.grad(out.square().sum(), pixels)
    assert torch.equal(out[0, 0], pixels[0, :, 16:, :16].flatten())
    assert torch.equal(grad[0, :, 16:, :16], 2 * pixels[0, :, 16:, :16]) and grad.count_nonzero() == 3 * 16 * 16


def test_image_batches_compile_with_any_batch_size():
    torch._dynamo.reset()
    compiled = torch.compile(gather_patches, fullgraph=True, dynamic=True, backend="aot_eager")
    for B in (2, 3, 5):
        pixels, index = draw((B, 3, 16, 16)), visible(B, 4, 2)
        assert torch.equal(compiled(pixels, index, (8, 8)), gather_patches(pixels, index, (8, 8)))


PIXELS, INDEX = torch.zeros(2, 3, 16, 16), torch.zeros(2, 5, dtype=torch.int64)
BAD_GATHER = [
    ((PIXELS, INDEX, (16,)), ValueError,
     "patch_size must be (p_h, p_w) or (p_t, p_h, p_w), each at least 1, got (16,)"),
    ((PIXELS, INDEX, (0, 4)), ValueError,
     "patch_size must be (p_h, p_w) or (p_t, p_h, p_w), each at least 1, got (0, 4)"),
    ((PIXELS, INDEX, (2, 4, 4)), ValueError,
     "pixels must be [B, C, T, H, W] for patch_size (2, 4, 4), got [2, 3, 16, 16]"),
    ((PIXELS[0], INDEX, (4, 4)), ValueError,
     "pixels must be [B, C, H, W] for patch_size (4, 4), got [3, 16, 16]"),
    ((PIXELS, INDEX, (4, 17)), ValueError,
     "pixels must hold at least one patch of (4, 17), got [2, 3, 16, 16]"),
    ((PIXELS.byte(), INDEX, (4, 4)), TypeError, "pixels must be floating point, got torch.uint8"),
    ((PIXELS, INDEX.int(), (4, 4)), ValueError,
     "index must be [B, K] or [P] int64, got [2, 5] torch.int32"),
    ((PIXELS, INDEX[None], (4, 4)), ValueError,
     "index must be [B, K] or [P] int64, got [1, 2, 5] torch.int64"),
    ((PIXELS, INDEX[:1], (4, 4)), ValueError, "index must be [B, K] with B = 2 as pixels, got [1, 5]"),
    ((PIXELS, INDEX + 16, (4, 4)), IndexError, "index must be in [0, 16), got 16"),
    ((PIXELS, INDEX - 1, (4, 4)), IndexError, "index must be in [0, 16), got -1"),
    ((PIXELS, INDEX[0] + 32, (4, 4)), IndexError, "index must be in [0, 32), got 32"),
]


@pytest.mark.parametrize("arguments, kind, message", BAD_GATHER)
def test_bad_input_of_gather(arguments, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        gather_patches(*arguments)


BAD_SCATTER = [
    ((torch.zeros(2, 5, 48), INDEX, (2, 3, 16), (4, 4)), ValueError,
     "shape must be [B, C, H, W] for patch_size (4, 4), got [2, 3, 16]"),
    ((torch.zeros(2, 5, 47), INDEX, (2, 3, 16, 16), (4, 4)), ValueError,
     "patches must be [2, 5, 48] for this index, shape and patch_size, got [2, 5, 47]"),
    ((torch.zeros(2, 5, 48), INDEX[0], (2, 3, 16, 16), (4, 4)), ValueError,
     "patches must be [5, 48] for this index, shape and patch_size, got [2, 5, 48]"),
    ((torch.zeros(2, 5, 48), None, (2, 3, 16, 16), (4, 4)), ValueError,
     "patches must be [2, 16, 48] for this index, shape and patch_size, got [2, 5, 48]"),
    ((torch.zeros(2, 5, 48), INDEX, (3, 3, 16, 16), (4, 4)), ValueError,
     "index must be [B, K] with B = 3 as shape, got [2, 5]"),
    ((torch.zeros(2, 5, 48), INDEX + 16, (2, 3, 16, 16), (4, 4)), IndexError, "index must be in [0, 16), got 16"),
]


@pytest.mark.parametrize("arguments, kind, message", BAD_SCATTER)
def test_bad_input_of_scatter(arguments, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        scatter_patches(*arguments)
