"""SIGReg under data parallelism: several gloo processes take the step that one process takes on the global batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jepa_fast import ops
from jepa_fast.nn.sigreg import SIGReg

V, D_IN, D = 3, 5, 7
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def batch(rows, dtype):
    """The global batch [V, N, D_IN], a mask, and a model."""
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(V, sum(rows), D_IN, generator=g), torch.rand(V, sum(rows), generator=g) < 0.7
    model = nn.Linear(D_IN, D)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=g))
    return x.to(dtype), mask, model.to(dtype)


def local(tensor, rows, rank):
    return tensor.split(rows, 1)[rank]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_equal_steps(ours, expected, what):
    for a, b in zip(ours, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < TOLERANCE[a.dtype], f"{what}: {a} {b}"


def check_global_batch(rank, rows, dtype, weighting, with_mask, group_dims):
    """Value and gradient, averaged by DDP, are those of one process on the whole batch."""
    x, mask, model = batch(rows, dtype)
    if with_mask:
        mask[1].split(rows)[0][:] = False  # a group without rows, on the first rank only
        mask[2] = False                    # and one without any
    options = {"step": 3, "num_slices": 50, "group_dims": group_dims}
    expected = gradients(model, ops.sigreg(model(x), row_mask=mask if with_mask else None, **options))
    parallel, mask = DistributedDataParallel(model), local(mask, rows, rank) if with_mask else None
    ours = gradients(model, ops.sigreg(parallel(local(x, rows, rank)), process_group="world", ddp_weighting=weighting,
                                       row_mask=mask, **options))
    assert_equal_steps(ours, expected, (rows, weighting, with_mask, group_dims))


def check_rank_weighting(rank, rows, dtype):
    """Ranks of different size, all of one weight: characteristic functions are averaged over the ranks."""
    x, _, model = batch(rows, dtype)
    directions, quadrature = ops.directions(0, 0, D, 20).to(dtype), ops.Quadrature.half_line(3.0, 17)
    p = (model(x) @ directions).unsqueeze(-1) * torch.tensor(quadrature.knots, dtype=dtype)
    means = torch.stack([torch.polar(torch.ones_like(part), part).mean(1) for part in p.split(rows, 1)]).mean(0)
    difference = (means - torch.tensor(quadrature.phi, dtype=dtype)).abs().square()
    expected = gradients(model, (difference @ torch.tensor(quadrature.weights, dtype=dtype)).mean() * sum(rows))
    parallel = DistributedDataParallel(model)
    ours = gradients(model, ops.sigreg(parallel(local(x, rows, rank)), directions, process_group="world",
                                       ddp_weighting="rank"))
    assert_equal_steps(ours, expected, (rows, "rank"))


def check_upstream_sync(rank, rows, dtype):
    """Scale "N" and ranks of different size: factors differ, and the step is that of the mean loss of the ranks."""
    x, _, model = batch(rows, dtype)
    world, options = len(rows), {"step": 1, "num_slices": 20}
    expected = gradients(model, ops.sigreg(model(x), scale="none", **options) * sum(rows) / world)
    parallel = DistributedDataParallel(model)
    ours = gradients(model, ops.sigreg(parallel(local(x, rows, rank)), scale="N", process_group="world",
                                       upstream_sync=True, **options))
    mean = ours[0].clone()
    dist.all_reduce(mean)
    assert_equal_steps([mean / world, *ours[1:]], expected, "upstream_sync")


def check_modules(rank, rows):
    """Presets reduce by themselves, and draw the same directions everywhere."""
    x, _, model = batch(rows, torch.float32)
    for preset in ("official", "bcs", "stable_pretraining", "paper"):
        options = {"num_slices": 30, "rng": "philox"}
        alone, together = (SIGReg.from_preset(preset, process_group=group, **options) for group in (None, "auto"))
        assert_equal_steps([together(local(x, rows, rank))], [alone(x)], preset)
    drawn = ops.directions(1, together.global_step, D, 30)
    everywhere = [torch.empty_like(drawn) for _ in rows]
    dist.all_gather(everywhere, drawn)
    assert all(torch.equal(other, drawn) for other in everywhere)


def check_subgroup(rank, rows):
    """A group of the first two ranks only."""
    x, _, model = batch(rows, torch.float32)
    pair = dist.new_group([0, 1])
    if rank > 1:
        with pytest.raises(ValueError, match="process_group does not contain this rank"):
            ops.sigreg(x, step=0, process_group=pair)
        return
    loss = ops.sigreg(local(x, rows, rank), step=0, num_slices=20, process_group=pair)
    assert_equal_steps([loss], [ops.sigreg(x[:, :rows[0] + rows[1]], step=0, num_slices=20)], "subgroup")


def worker(rank, world, init):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    even, uneven, empty = [12] * world, [5 + 9 * r for r in range(world)], [0] + [8] * (world - 1)
    for dtype in (torch.float64, torch.float32):
        for with_mask in (False, True):
            for group_dims in ("leading", "flatten"):
                for rows in (even, uneven, empty):
                    check_global_batch(rank, rows, dtype, "sample", with_mask, group_dims)
        check_global_batch(rank, even, dtype, "rank", False, "leading")
        check_rank_weighting(rank, uneven, dtype)
        check_upstream_sync(rank, uneven, dtype)
    check_modules(rank, even)
    check_subgroup(rank, uneven)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_step_of_the_global_batch(world, tmp_path):
    torch.multiprocessing.spawn(worker, (world, f"file://{tmp_path}/init"), nprocs=world)
