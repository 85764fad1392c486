"""Attentive probes: one against transformers, a grid against the same probes trained alone by torch.optim."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import VJEPA2Config
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2AttentivePooler

from jepa_fast.eval.attentive import AttentiveProbe
from jepa_fast.eval.probe_grid import VJEPA2_PROBES, VJEPA_PROBE, ProbeGrid, ProbeGridConfig, attentive_probe


class TheirProbe(nn.Module):
    """The pooler of transformers with a classifier."""

    def __init__(self, dim: int, heads: int, depth: int, num_classes: int):
        super().__init__()
        config = VJEPA2Config(hidden_size=dim, num_attention_heads=heads, mlp_ratio=4, num_pooler_layers=depth - 1,
                              layer_norm_eps=1e-5)
        config._attn_implementation = "sdpa"  # the eager one takes its softmax in float32
        self.pooler, self.linear = VJEPA2AttentivePooler(config), nn.Linear(dim, num_classes)

    def forward(self, tokens):
        return self.linear(self.pooler(tokens))

    def load_ours(self, state: dict) -> None:
        """From official names, with queries, keys and values split."""
        split = {}
        for name, value in state.items():
            fused = re.search(r"\.(qkv|kv)\.", name)
            if fused:
                parts = value.chunk(len(fused[1]))
                split |= {name.replace(fused[0], f".{letter}."): part
                          for letter, part in zip(fused[1], parts, strict=True)}
            else:
                split[name] = value
        renamed = ((r"cross_attention_block", "cross_attention_layer"), (r"blocks", "self_attention_layers"),
                   (r"norm(\d)", r"layer_norm\1"), (r"xattn\.([qkv])\.", r"cross_attn.\1_proj."),
                   (r"\.attn\.proj", ".self_attn.out_proj"), (r"\.attn\.([qkv])\.", r".self_attn.\1_proj."))
        for pattern, new in renamed:
            split = {re.sub(pattern, new, name): value for name, value in split.items() if "xattn.proj" not in name}
        self.load_state_dict(split)


def spread_(module: nn.Module) -> nn.Module:
    """Every parameter away from the zeros and ones it starts with, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


@pytest.mark.parametrize("depth", [1, 4])
def test_probe_is_that_of_transformers(depth):
    ours = spread_(AttentiveProbe(24, 5, depth=depth, num_heads=4).double())
    theirs = TheirProbe(24, 4, depth, 5).double()
    theirs.load_ours(ours.state_dict())
    tokens = 3 * torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 1
    a, b = ours(tokens), theirs(tokens)
    assert (a - b).abs().max() < 1e-12 * b.abs().max()
    for logits in (a, b):
        logits.square().sum().backward()
    for name in ("linear.weight", "pooler.query_tokens"):
        a, b = ours.get_parameter(name).grad, theirs.get_parameter(name).grad
        assert (a - b).abs().max() < 1e-11 * b.abs().max()


def test_names_and_start_are_official():
    names = set(AttentiveProbe(16, 3, depth=2, num_heads=2, has_unused_proj=True).state_dict())
    linear = {f"{name}.{kind}" for kind in ("weight", "bias") for name in (
        "linear", *(f"pooler.blocks.0.{part}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")),
        *(f"pooler.cross_attention_block.{part}" for part in ("norm1", "xattn.q", "xattn.kv", "xattn.proj", "norm2",
                                                              "mlp.fc1", "mlp.fc2")))}
    assert names == linear | {"pooler.query_tokens"}
    pooler = AttentiveProbe(128, 3, depth=4, num_heads=2, generator=torch.Generator().manual_seed(0)).pooler
    last = pooler.cross_attention_block
    for weight, std in ((pooler.query_tokens, 0.02), (last.xattn.kv.weight, 0.02), (last.mlp.fc1.weight, 0.02),
                        (last.mlp.fc2.weight, 0.02 / math.sqrt(6)), (pooler.blocks[0].mlp.fc2.weight, 0.02 / math.sqrt(2)),
                        (pooler.blocks[2].attn.proj.weight, 0.02 / math.sqrt(6))):
        assert abs(float(weight.detach().std()) / std - 1) < (0.2 if weight.numel() < 1000 else 0.03)


GRIDS = {
    "vjepa": ProbeGridConfig(depth=1, num_heads=2, lrs=(1e-2,), weight_decays=(0.3,), final_weight_decay=1e-6,
                             decay_all=False, clip_grad=0.5, epochs=2, batch_size=8),
    "depth 1": ProbeGridConfig(depth=1, num_heads=2, lrs=(1e-2, 1e-3), weight_decays=(0.01, 0.8), epochs=2, batch_size=8),
    "depth 4": ProbeGridConfig(depth=4, num_heads=2, lrs=(1e-2, 1e-3), weight_decays=(0.01, 0.8), epochs=2, batch_size=8),
}


@pytest.mark.parametrize("config", GRIDS.values(), ids=GRIDS)
def test_grid_trains_each_probe_as_if_alone(config):
    """float64, to rounding: transformers' pooler, torch.optim.AdamW and clip_grad_norm_, one probe at a time."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(27, 5, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (27,), generator=generator)
    rows = torch.arange(2, 27)
    grid = ProbeGrid(config, 8, 3, dtype=torch.float64)
    with torch.no_grad():
        grid.flat.copy_(_flat(spread_(grid.probe(0))).expand_as(grid.flat))
    start = grid.probe(0).state_dict()
    grid.fit(tokens, labels, rows)
    for number, (lr, decay) in enumerate(config.settings):
        alone = TheirProbe(8, 2, config.depth, 3).double()
        alone.load_ours(start)
        # the key bias of the cross-attention has no effect, and no gradient but rounding
        optimizer = torch.optim.AdamW([{"params": [p], "decays": config.decay_all or p.dim() > 1}
                                       for p in alone.parameters()], lr=lr)
        order = torch.Generator().manual_seed(config.seed)
        steps = 0
        for _ in range(config.epochs):
            for batch in rows[torch.randperm(25, generator=order)].split(8)[:3]:
                steps += 1
                fall = (1 + math.cos(math.pi * steps / 6)) / 2
                final = decay if config.final_weight_decay is None else config.final_weight_decay
                for group in optimizer.param_groups:
                    group["lr"] = lr * fall
                    group["weight_decay"] = (final + (decay - final) * fall) * group["decays"]
                optimizer.zero_grad()
                F.cross_entropy(alone(tokens[batch]), labels[batch]).backward()
                if config.clip_grad is not None:
                    assert nn.utils.clip_grad_norm_(alone.parameters(), config.clip_grad) > config.clip_grad
                optimizer.step()
        trained, expected = grid.probe(number), TheirProbe(8, 2, config.depth, 3).double()
        expected.load_ours(trained.state_dict())
        moved = TheirProbe(8, 2, config.depth, 3).double()
        moved.load_ours(start)
        for (name, a), b, c in zip(alone.named_parameters(), expected.parameters(), moved.parameters(), strict=True):
            assert (a - b).abs().max() < 1e-9, f"probe {number}, {name}"
            assert "k_proj.bias" in name or (a - c).abs().max() > 1e-5, f"{name} did not move"
        assert (alone(tokens) - trained(tokens)).abs().max() < 1e-8


def _flat(probe: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in probe.parameters()])


def test_grid_float32_forward_is_near_float64():
    config = ProbeGridConfig(depth=2, num_heads=4, lrs=(1e-3, 1e-4), weight_decays=(0.1,))
    grid = ProbeGrid(config, 64, 5)
    tokens = torch.randn(4, 50, 64, generator=torch.Generator().manual_seed(0))
    exact = torch.stack([grid.probe(g).double()(tokens.double()) for g in range(2)])
    assert (grid.logits(tokens) - exact).abs().max() < 2e-6


@pytest.mark.parametrize("depth", [1, 3])
def test_batches_in_parts_train_the_same(depth):
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randn(20, 5, 8, generator=generator, dtype=torch.float64), torch.arange(20) % 3
    grids = []
    for max_bytes in (2**33, 1):
        config = ProbeGridConfig(depth=depth, num_heads=2, epochs=2, batch_size=10, lrs=(1e-2,), max_bytes=max_bytes)
        grids.append(ProbeGrid(config, 8, 3, dtype=torch.float64))
        grids[-1].fit(tokens, labels, torch.arange(20))
    assert (grids[0].flat - grids[1].flat).abs().max() < 1e-9
    assert [len(grid._parts(torch.arange(20), tokens)) for grid in grids] == [1, 20]


def planted(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of noise; one of them, anywhere, carries the class. The mean over tokens says little."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randn(n, 12, 16, generator=generator), torch.randint(0, 4, (n,), generator=generator)
    place = torch.randint(0, 12, (n,), generator=generator)
    tokens[torch.arange(n), place] += 12 * F.one_hot(labels, 16)
    return tokens, labels


SMALL = ProbeGridConfig(depth=1, num_heads=4, epochs=30, batch_size=32)


def test_planted_classes_are_found():
    """In half precision too, by the probe that held-out train rows chose."""
    train, test = planted(500, 0), planted(200, 1)
    result = attentive_probe(train[0].half(), train[1], test[0].half(), test[1], SMALL)
    assert result.accuracy >= 0.99 and result.held_accuracy.max() >= 0.98
    assert result.held_accuracy.shape == (20,) and result.held_accuracy.min() < 0.9  # the smallest lr learns little
    right = result.probe(test[0].half().float()).argmax(1) == test[1]
    assert float(right.float().mean()) == result.accuracy
    assert (result.lr, result.weight_decay) == SMALL.settings[int(result.held_accuracy.argmax())]


def test_shuffled_labels_stay_at_chance():
    train, test = planted(400, 0), planted(400, 1)
    shuffled = train[1][torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    result = attentive_probe(train[0], shuffled, test[0], test[1], SMALL)
    assert abs(result.accuracy - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)


def test_a_probe_that_diverges_is_not_chosen_and_spoils_no_other():
    train, test = planted(300, 0), planted(100, 1)
    config = ProbeGridConfig(depth=1, num_heads=4, epochs=8, batch_size=32, lrs=(1e38, 3e-3), weight_decays=(0.1,))
    result = attentive_probe(*train, *test, config)
    alone = attentive_probe(*train, *test, ProbeGridConfig(depth=1, num_heads=4, epochs=8, batch_size=32, lrs=(3e-3,),
                                                           weight_decays=(0.1,)))
    assert result.held_accuracy[0] == 0 and result.lr == 3e-3
    assert result.held_accuracy[1] == alone.held_accuracy[0] and result.accuracy == alone.accuracy


def test_presets_are_the_published_ones():
    assert len(VJEPA2_PROBES.settings) == 20 and VJEPA2_PROBES.depth == 4 and VJEPA2_PROBES.decay_all
    assert VJEPA_PROBE.settings == [(1e-3, 0.01)] and VJEPA_PROBE.final_weight_decay == 1e-6 and VJEPA_PROBE.clip_grad == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"train_tokens": torch.zeros(8, 16)}, r"train_tokens must be \[n, N, D\] floating point, got \[8, 16\]"),
    ({"test_tokens": torch.zeros(4, 3, 8)}, "test_tokens must have width 16 as train_tokens, got 8"),
    ({"test_labels": torch.zeros(3, dtype=torch.int64)}, r"test_labels must be \[4\] int64"),
    ({"config": ProbeGridConfig(num_heads=5)}, "dim must be a multiple of num_heads, got 16 and 5"),
])
def test_mistakes(change, message):
    arguments = {"train_tokens": torch.zeros(8, 3, 16), "train_labels": torch.zeros(8, dtype=torch.int64),
                 "test_tokens": torch.zeros(4, 3, 16), "test_labels": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        attentive_probe(**arguments)


def test_config_mistakes():
    with pytest.raises(ValueError, match="lrs must be positive"):
        ProbeGridConfig(lrs=())
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        ProbeGridConfig(depth=0)
    with pytest.raises(ValueError, match="depth and num_classes must be at least 1, got 0 and 3"):
        AttentiveProbe(8, 3, depth=0, num_heads=2)
