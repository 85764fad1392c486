"""Rotary positions against what the official V-JEPA 2 code computes, and the two pairings' own properties."""

import pytest
import torch
import torch.nn.functional as F
from golden_data import config, error, golden, under

from jepa_fast.nn.rotary import axis_widths, grid_positions, rotary_table
from jepa_fast.ops import varlen_attention_qkv
from jepa_fast.reference.varlen_attention import rotate, rotate_backward

ROPE = "vjepa2_rope"
ROTATIONS = sorted({key.split("/")[1] for key in golden(ROPE) if key.startswith("rotate/")})
ATTENTIONS = [(head_dim, heads, kind) for head_dim, heads in config(ROPE)["attention"]
              for kind in ("all", "masked", "no_grid")]


@pytest.mark.parametrize("name", ROTATIONS)
def test_one_axis_is_the_official_map(name):
    case = under(golden(ROPE), f"rotate/{name}/")
    x, width = case["x"], case["x"].shape[-1]
    positions = case["pos"].float().expand(x.shape[:3]).reshape(-1, 1)
    rotary = rotary_table(positions, (width,), "tiled")

    def flat(t):
        return t.reshape(-1, 1, width)

    assert error(rotate(flat(x), rotary), flat(case["out"])) < 2e-7
    assert error(rotate(flat(x).double(), rotary), flat(golden(ROPE)[f"f64/rotate/{name}/out"])) < 5e-7
    assert error(rotate_backward(flat(case["upstream"]), rotary), flat(case["grad_x"])) < 2e-7


@pytest.mark.parametrize("head_dim, heads, kind", ATTENTIONS)
def test_attention_with_rotary_positions_is_the_official_one(head_dim, heads, kind):
    at = f"attention/head_dim{head_dim}/"
    weights, case = under(golden(ROPE), f"{at}all/weights/"), under(golden(ROPE), f"{at}{kind}/")
    x = case["x"].clone().requires_grad_()
    (B, N, D), grid = x.shape, tuple(config(ROPE)["grid"])
    index = golden(ROPE)[f"{at}index"] if kind != "all" else torch.arange(N).expand(B, N)
    if kind == "no_grid":  # the official predictor takes frames to be square
        grid = (grid[0], grid[1], grid[1])
    positions = grid_positions(grid, index.reshape(-1))
    if kind == "no_grid":
        positions[:, 0] = index.reshape(-1) // (grid[1] * grid[1])
    rotary = rotary_table(positions, axis_widths(head_dim), "tiled")
    qkv = F.linear(x, weights["qkv.weight"], weights["qkv.bias"]).view(B * N, 3, heads, head_dim)
    cu_seqlens = torch.arange(0, (B + 1) * N, N, dtype=torch.int32)
    out = varlen_attention_qkv(qkv, cu_seqlens, N, rotary=rotary)
    out = F.linear(out.reshape(B, N, D), weights["proj.weight"], weights["proj.bias"])
    assert error(out, golden(ROPE)[f"f64/{at}{kind}/out"]) < 2e-6
    (grad_x,) = torch.autograd.grad(out, x, case["upstream"])
    assert error(grad_x, case["grad_x"]) < 3e-6


def test_interleaved_is_a_rotation_and_tiled_is_not():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, 64, generator=generator, dtype=torch.float64)
    positions = torch.rand(50, 3, generator=generator) * 31
    for pairing, is_rotation in (("interleaved", True), ("tiled", False)):
        rotary = rotary_table(positions, axis_widths(64), pairing).double()
        turned = rotate(x, rotary)
        assert torch.equal(turned[..., 60:], x[..., 60:])
        assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6) is is_rotation
        assert torch.allclose(rotate_backward(turned, rotary), x, atol=1e-5) is is_rotation


def test_interleaved_scores_depend_on_differences_alone():
    """Per axis: moving all tokens by the same step leaves q k^T as it was."""
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 20, 1, 64, generator=generator, dtype=torch.float64).unbind(0)
    positions = torch.randint(0, 16, (20, 3), generator=generator)

    def scores(moved):
        rotary = rotary_table(positions + moved, axis_widths(64), "interleaved").double()
        return torch.einsum("qhd,khd->qk", rotate(q, rotary), rotate(k, rotary))

    assert torch.allclose(scores(0), scores(torch.tensor([3, 0, 5])), atol=1e-4)


def test_position_zero_leaves_a_token_alone():
    x = torch.randn(4, 2, 30)
    for pairing in ("interleaved", "tiled"):
        assert torch.equal(rotate(x, rotary_table(torch.zeros(4, 3), (10, 10, 10), pairing)), x)


def test_angles_as_under_autocast():
    """bfloat16 angles: off by up to 0.03 rad at position 31, and whole bfloat16 numbers."""
    positions = torch.arange(32.0).unsqueeze(1)
    for pairing in ("interleaved", "tiled"):
        exact = rotary_table(positions, (20,), pairing)
        rounded = rotary_table(positions, (20,), pairing, angle_dtype=torch.bfloat16)
        assert torch.equal(rounded, rounded.bfloat16().float())
        assert 0.005 < (rounded - exact).abs().max() < 0.06


@pytest.mark.parametrize("arguments, message", [
    ((torch.zeros(4, 2), (10, 10, 10), "tiled"), r"positions must be \[P, 3\], one per width, got \[4, 2\]"),
    ((torch.zeros(4, 1), (9,), "tiled"), "widths must be even"),
    ((torch.zeros(4, 1), (8,), "halves"), "pairing must be one of interleaved, tiled, got 'halves'"),
])
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        rotary_table(*arguments)


@pytest.mark.parametrize("change, message", [
    ({"rotary": torch.zeros(5, 2, 8)}, r"rotary must be \[P, 2, R\] with P = 4"),
    ({"rotary": torch.zeros(4, 2, 18)}, "R even, at most 16"),
    ({"rotary": torch.zeros(4, 2, 8, requires_grad=True)}, "must not require a gradient"),
    ({"frame_size": -1}, "frame_size must be 0"),
])
def test_attention_names_bad_rotary(change, message):
    with pytest.raises(ValueError, match=message):
        varlen_attention_qkv(torch.zeros(4, 3, 1, 16), torch.tensor([0, 4], dtype=torch.int32), 4, **change)
