"""Steps replayed as CUDA graphs would, on the CPU: the same bits as steps that are run, whatever changes between them."""

import contextlib
import dataclasses

import pytest
import torch
from fake_graphs import FakeGraphs, HostRead, Record

from jepa_fast import ops
from jepa_fast.masking import BlockMask, MultiBlock, MultiBlock3D
from jepa_fast.models.encoder import VisionTransformerConfig
from jepa_fast.models.predictor import PredictorConfig
from jepa_fast.models.video_encoder import VideoTransformerConfig
from jepa_fast.models.video_predictor import VideoPredictorConfig
from jepa_fast.objectives.latent_prediction import LatentPredictionConfig
from jepa_fast.objectives.lejepa import LeJEPAConfig
from jepa_fast.objectives.video_prediction import VideoPredictionConfig
from jepa_fast.optim import Horizon
from jepa_fast.recipes.eb_jepa import eb_jepa_two_rooms_small
from jepa_fast.recipes.ijepa import ijepa_mnist
from jepa_fast.train.distributed import World
from jepa_fast.train.graph import CudaGraphs, GraphedStep
from jepa_fast.train.options import apply_options
from jepa_fast.train.step import TrainStep, build_optimizer

CPU = World(0, 1, torch.device("cpu"))
IJEPA = LatentPredictionConfig(
    encoder=VisionTransformerConfig(image_size=28, patch_size=4, in_chans=1, embed_dim=32, depth=2, num_heads=2,
                                    drop_path=0.4),
    predictor=PredictorConfig(embed_dim=16, depth=1), masking=MultiBlock(min_keep=2, mask_group_size=8))
KINDS = (BlockMask(num_blocks=2, spatial_scale=(0.2, 0.3)), BlockMask(num_blocks=1, spatial_scale=(0.5, 0.5)))
VIDEO = VideoPredictionConfig(
    encoder=VideoTransformerConfig(image_size=16, num_frames=4, patch_size=4, in_chans=1, embed_dim=36, depth=2, num_heads=2,
                                   positions="rotary"),
    predictor=VideoPredictorConfig(embed_dim=24, depth=1, num_heads=2), masking=MultiBlock3D(masks=KINDS, mask_group_size=4),
    reg_coeff=0.1, mask_token_by="clip")


def recipe(objective, clip_grad=None, **train):
    base = ijepa_mnist()
    return dataclasses.replace(
        base, objective=objective, optim=dataclasses.replace(base.optim, clip_grad=clip_grad),
        train=dataclasses.replace(base.train, batch_size=4, **{"precision": "fp32", "pad_tokens_to": 16} | train))


def batch(objective, number):
    g = torch.Generator().manual_seed(number)
    if isinstance(objective, VideoPredictionConfig):
        return {"clips": torch.randn(4, 1, 4, 16, 16, generator=g), "index": torch.arange(4), "paths": ["not a tensor"]}
    if isinstance(objective, LatentPredictionConfig):
        return {"images": torch.randn(4, 1, 28, 28, generator=g), "index": torch.arange(4)}
    return {"images": [torch.randn(4, 1, size, size, generator=g) for size in (28, 28, 16)], "index": torch.arange(4)}


def train(config, count, graphs=None, world=CPU, **options):
    """Losses of all steps, all weights and state in the end, the step object."""
    torch.manual_seed(0)
    objective = config.objective.build().to(world.device)
    step = TrainStep(config, objective, build_optimizer(config, objective), Horizon(count, 1, 1.0), world)
    step = GraphedStep(step, graphs=graphs, **options) if graphs else step
    losses = []
    # for equal bits on the CPU: plain alone has both forms of the optimizer's op there
    with ops.use_backend("plain", "adamw_ema_") if world is CPU else contextlib.nullcontext():
        for number in range(count):
            here = {k: v.to(world.device) if isinstance(v, torch.Tensor) else v
                    for k, v in batch(config.objective, number).items()}
            losses.append({k: v.clone() for k, v in step(here, number)[0].items()})
    optimizer = (step.step if graphs else step).optimizer
    state = [value for p in optimizer.state.values() for value in p.values()]
    return losses, [*objective.state_dict().values(), *state], step


def assert_same_bits(eager, replayed):
    for mine, theirs in zip(replayed[0], eager[0], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(mine[name], value), name
    for mine, theirs in zip(replayed[1], eager[1], strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


CASES = {"I-JEPA, stochastic depth, clipped": recipe(IJEPA, clip_grad=0.1),
         "I-JEPA in bfloat16, target in float8": recipe(dataclasses.replace(IJEPA, encoder=dataclasses.replace(
             IJEPA.encoder, drop_path=0.0)), precision="bf16", target_precision="fp8"),
         "V-JEPA 2": recipe(VIDEO, pad_tokens_to=32)}


@pytest.mark.parametrize("name", CASES)
def test_replays_are_the_steps_themselves(name):
    """Ten steps of several shapes: masks, images, rates, momentum, bias corrections and random numbers all change."""
    config = CASES[name]
    eager, replayed = train(config, 10), train(config, 10, FakeGraphs())
    assert_same_bits(eager, replayed)
    step = replayed[2]
    assert step.work == eager[2].work and step.work.tokens > 0
    assert step.num_captures >= 2 and step.num_replays + step.num_eager == 10
    assert step.num_replays > step.num_captures


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", CASES)
def test_replays_on_a_gpu(name):
    if "float8" in name and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no tensor cores for float8")
    world = World(0, 1, torch.device("cuda", 0))
    eager, replayed = train(CASES[name], 10, world=world), train(CASES[name], 10, CudaGraphs(), world)
    limit = 2e-2 if "bfloat16" in name else 1e-4
    for mine, theirs in zip(replayed[0], eager[0], strict=True):
        torch.testing.assert_close(mine["loss"], theirs["loss"], rtol=limit, atol=0)
    assert replayed[2].num_captures >= 2


def test_lejepa_draws_new_directions_in_every_replay():
    config = recipe(LeJEPAConfig(encoder=IJEPA.encoder, projector=(32, 16)), pad_tokens_to=0)
    eager, replayed = train(config, 6), train(config, 6, FakeGraphs())
    assert_same_bits(eager, replayed)
    assert (replayed[2].num_eager, replayed[2].num_captures, replayed[2].num_replays) == (3, 1, 3)


def test_nothing_is_captured_after_warm_up():
    config = recipe(IJEPA, pad_tokens_to=32)
    graphs = FakeGraphs()
    _, _, step = train(config, 12, graphs)
    captures, eager = step.num_captures, step.num_eager
    for number in range(12):
        step(batch(IJEPA, number), number)
    shapes = len(step._graphs)
    step.num_replays = 0
    for number in range(12):
        step(batch(IJEPA, number), number)
    assert step.num_replays == 12 and len(step._graphs) == shapes
    assert captures <= shapes <= captures + eager


def test_few_graphs_make_room_for_each_other():
    config = recipe(IJEPA)
    eager, replayed = train(config, 10), train(config, 10, FakeGraphs(), max_graphs=1, warmup_steps=1)
    assert_same_bits(eager, replayed)
    assert len(replayed[2]._graphs) == 1


def test_loaded_state_drops_the_graphs():
    config = recipe(IJEPA)
    _, _, step = train(config, 10, FakeGraphs())
    assert step._graphs
    step.step.optimizer.load_state_dict(step.step.optimizer.state_dict())
    before, captures = dict(step._graphs), step.num_captures
    step(batch(IJEPA, 9), 9)
    assert not any(graph is other for graph in step._graphs.values() for other in before.values())
    assert len(step._graphs) == step.num_captures - captures <= 1


def test_the_fake_refuses_what_a_gpu_would():
    x = torch.ones(3)
    for read in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: torch.tensor([1.0, 2.0]), lambda: bool(x[0] > 0),
                 lambda: torch.repeat_interleave(x, torch.ones(3, dtype=torch.int64))):
        with pytest.raises(HostRead), Record():
            read()


def test_where_it_is_refused():
    def build(config):
        objective = config.objective.build()
        return TrainStep(config, objective, build_optimizer(config, objective), Horizon(10, 1, 1.0), CPU)

    with pytest.raises(ValueError, match="^train.cuda_graphs needs a CUDA device, got cpu$"):
        build(recipe(IJEPA, cuda_graphs=True))
    for fields, message in (({"accumulate": 2}, "needs train.accumulate 1, got 2"),
                            ({"shard_ranks": -1}, "needs train.shard_ranks 1, got -1"),
                            ({"pad_tokens_to": 0}, "needs train.pad_tokens_to, so that the shapes .* come back; got 0"),
                            ({}, "is for one process, got 2")):
        config = recipe(IJEPA, cuda_graphs=True, **fields)
        with pytest.raises(ValueError, match=f"^train.cuda_graphs {message}$"):
            apply_options(config, config.objective.build(), None, World(0, 1 if fields else 2, torch.device("cuda")))
    for number, message in ((-1, "must be at least 0, got -1"), (64, "is for I-JEPA, V-JEPA and V-JEPA 2, got EBJEPA")):
        config = eb_jepa_two_rooms_small() if number == 64 else recipe(IJEPA)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, pad_tokens_to=number))
        with pytest.raises(ValueError, match=f"^train.pad_tokens_to {message}$"):
            build(config)
    with pytest.raises(ValueError, match="objectives whose steps differ in tensors only.*got EBJEPA"):
        config = eb_jepa_two_rooms_small()
        GraphedStep(build(config), graphs=FakeGraphs())
    with pytest.raises(ValueError, match="^max_graphs and warmup_steps must be at least 1, got 0 and 3$"):
        GraphedStep(build(recipe(IJEPA)), max_graphs=0, graphs=FakeGraphs())
