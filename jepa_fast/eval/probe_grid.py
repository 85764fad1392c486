"""A whole grid of attentive probes, trained at once on frozen tokens.

The parameters of all probes are one tensor [G, P]: one forward, one backward, one AdamW over it, in which learning rate
and weight decay are columns. Schedules and sample orders are made before the first step, and nothing in between waits
for the device. Officially 20 probes have 20 optimizers and the test set chooses the best; here held-out train rows do.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check_labels
from .attentive import AttentiveProbe, attentive_logits
from .linear import _split


@dataclass(frozen=True, kw_only=True)
class ProbeGridConfig:
    """The probes of V-JEPA 2 by default; `VJEPA_PROBE` is that of V-JEPA. Every lr is tried with every weight decay."""

    depth: int = 4                                                      # 1: cross-attention alone
    num_heads: int = 16
    lrs: tuple[float, ...] = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)             # at the start; cosine to 0
    weight_decays: tuple[float, ...] = (0.01, 0.1, 0.4, 0.8)
    final_weight_decay: float | None = None                             # cosine to this; None: constant
    decay_all: bool = True                                              # biases and one-dimensional parameters decay too
    clip_grad: float | None = None                                      # largest gradient norm, per probe
    has_unused_proj: bool = False                                       # as V-JEPA's checkpoints
    epochs: int = 20
    batch_size: int = 256
    holdout: float = 0.2                                                # fraction of the train rows that choose
    precision: Literal["fp32", "bf16"] = "fp32"                         # bf16: autocast
    max_bytes: int = 8 * 2**30                                          # of activations; larger batches go in parts
    seed: int = 0                                                       # of the start, the order and the held-out rows

    def __post_init__(self):
        if not self.lrs or not self.weight_decays or min(self.lrs) <= 0 or min(self.weight_decays) < 0:
            raise ValueError(f"lrs must be positive and weight_decays at least 0, one or more of each, "
                             f"got {self.lrs} and {self.weight_decays}")
        for name in ("depth", "num_heads", "epochs", "batch_size", "max_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def settings(self) -> list[tuple[float, float]]:
        """(lr, weight_decay) of each probe."""
        return [(lr, decay) for lr in self.lrs for decay in self.weight_decays]


VJEPA2_PROBES = ProbeGridConfig()
VJEPA_PROBE = ProbeGridConfig(depth=1, lrs=(1e-3,), weight_decays=(0.01,), final_weight_decay=1e-6, decay_all=False,
                              clip_grad=1.0, has_unused_proj=True)


@dataclass(frozen=True, kw_only=True)
class ProbeGridResult:
    accuracy: float              # fraction of the test rows that the chosen probe classifies right
    held_accuracy: Tensor        # [G] on held-out train rows, which chose; 0 for a probe that diverged
    lr: float                    # of the chosen probe
    weight_decay: float
    probe: AttentiveProbe        # the chosen probe


def attentive_probe(train_tokens: Tensor, train_labels: Tensor, test_tokens: Tensor, test_labels: Tensor,
                    config: ProbeGridConfig = VJEPA2_PROBES) -> ProbeGridResult:
    """Train every probe of the grid on tokens [n, N, D] with labels [n] int64, and judge the best of them.

    A fraction `config.holdout` of the train rows trains nothing: the probe that is most accurate on it (at a tie the
    first) meets the test rows. Tokens of any floating dtype are computed with in float32 (float64 stays); all on one
    device. Raises ValueError for what does not fit.
    """
    for name, tokens, labels in (("train", train_tokens, train_labels), ("test", test_tokens, test_labels)):
        if tokens.dim() != 3 or not tokens.numel() or not tokens.is_floating_point():
            raise ValueError(f"{name}_tokens must be [n, N, D] floating point, got {list(tokens.shape)} {tokens.dtype}")
        check_labels(f"{name}_labels", labels, f"{name}_tokens", tokens)
    if test_tokens.shape[2] != train_tokens.shape[2]:
        raise ValueError(f"test_tokens must have width {train_tokens.shape[2]} as train_tokens, got {test_tokens.shape[2]}")
    kept, held = _split(len(train_labels), config.holdout, config.seed, train_labels.device)
    grid = ProbeGrid(config, train_tokens.shape[2], int(train_labels.max()) + 1, train_tokens.device,
                     torch.float64 if train_tokens.dtype == torch.float64 else torch.float32)
    grid.fit(train_tokens, train_labels, kept)
    held_accuracy = grid.accuracy(train_tokens, train_labels, held)
    best = int(held_accuracy.argmax())
    lr, weight_decay = config.settings[best]
    accuracy = grid.accuracy(test_tokens, test_labels, torch.arange(len(test_labels), device=test_labels.device))[best]
    return ProbeGridResult(accuracy=float(accuracy), held_accuracy=held_accuracy, lr=lr, weight_decay=weight_decay,
                           probe=grid.probe(best))


class ProbeGrid:
    """G probes that start alike, as one tensor `flat` [G, P] and one AdamW."""

    def __init__(self, config: ProbeGridConfig, dim: int, num_classes: int, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32):
        self.config = config
        self._new_probe = lambda: AttentiveProbe(dim, num_classes, depth=config.depth, num_heads=config.num_heads,
                                                 has_unused_proj=config.has_unused_proj,
                                                 generator=torch.Generator().manual_seed(config.seed))
        start = dict(self._new_probe().named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in start.items()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        flat = torch.cat([parameter.detach().flatten() for parameter in start.values()]).to(device, dtype)
        self.flat = flat.repeat(len(config.settings), 1).requires_grad_()
        decays = torch.tensor([not name.endswith("bias") and len(shape) > 1 for name, shape in self.shapes.items()])
        # [1], or [P] where some parameters do not decay
        self.decays = (torch.ones(1) if config.decay_all
                       else torch.repeat_interleave(decays, torch.tensor(self.sizes))).to(device, dtype)
        self.mean_square, self.mean = torch.zeros_like(self.flat), torch.zeros_like(self.flat)

    def fit(self, tokens: Tensor, labels: Tensor, rows: Tensor) -> None:
        """Train all probes on `rows` of tokens [n, N, D] for the configured epochs; a last smaller batch is left out."""
        batch_size = min(self.config.batch_size, len(rows))
        steps_per_epoch = len(rows) // batch_size
        lrs, decays = self.schedules(steps_per_epoch * self.config.epochs)
        generator = torch.Generator().manual_seed(self.config.seed)
        step = 0
        for _ in range(self.config.epochs):
            order = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
            for batch in order.split(batch_size)[:steps_per_epoch]:
                grads = [self.grad(tokens[part], labels[part]) / batch_size for part in self._parts(batch, tokens)]
                self.step_(sum(grads[1:], grads[0]), step + 1, lrs[step], decays[step])
                step += 1

    def grad(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """[G, P], for each probe of the sum over the rows of its cross entropy."""
        logits = self.logits(tokens)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="sum")
        return torch.autograd.grad(losses, self.flat)[0]

    def schedules(self, num_steps: int) -> tuple[Tensor, Tensor]:
        """Learning rate and weight decay of every step and probe, [num_steps, G, 1]; step 1 is the first, as official."""
        lrs, decays = torch.tensor(self.config.settings, dtype=torch.float64).T
        fall = 0.5 * (1 + torch.cos(torch.pi * torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps))[:, None]
        final = decays if self.config.final_weight_decay is None else self.config.final_weight_decay
        return tuple(values.unsqueeze(2).to(self.flat) for values in (lrs * fall, final + (decays - final) * fall))

    @torch.no_grad()
    def step_(self, grad: Tensor, step: int, lr: Tensor, weight_decay: Tensor) -> None:
        """AdamW on all probes; lr and weight_decay [G, 1]."""
        if self.config.clip_grad is not None:
            norms = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
            grad = grad * (self.config.clip_grad / (norms + 1e-6)).clamp_max(1)
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        self.mean.lerp_(grad, 1 - beta1)
        self.mean_square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        self.flat.mul_(1 - lr * weight_decay * self.decays)
        deviation = self.mean_square.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
        self.flat.addcdiv_(self.mean * (lr / (1 - beta1**step)), deviation, value=-1)

    def logits(self, tokens: Tensor) -> Tensor:
        """[G, B, num_classes] of tokens [B, N, D]."""
        parts = self.flat.split(self.sizes, dim=1)
        stacked = {name: part.view(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return attentive_logits(stacked, tokens.to(self.flat.dtype), self.config.num_heads).to(self.flat.dtype)

    @torch.no_grad()
    def accuracy(self, tokens: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """[G] on `rows` of the tokens; a probe with logits that are not finite classifies nothing."""
        right = torch.zeros(len(self.flat), dtype=torch.int64, device=tokens.device)
        for batch in self._parts(rows, tokens):
            logits = self.logits(tokens[batch])
            right += ((logits.argmax(2) == labels[batch]) & logits.isfinite().all(2)).sum(1)
        return right / len(rows)

    def _parts(self, rows: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """Rows that fit into memory together: scores [G, B, heads, N] at depth 1, else about 16 [G, B, N, D] per block."""
        (G, _), (N, D), config = self.flat.shape, tokens.shape[1:], self.config
        values = 2 * N * D + 4 * G * config.num_heads * N + 16 * G * N * D * (config.depth - 1)
        return rows.split(max(1, config.max_bytes // (values * self.flat.element_size())))

    def probe(self, number: int) -> AttentiveProbe:
        """One of the probes as a module of its own."""
        probe = self._new_probe().to(self.flat)
        parts = self.flat.detach()[number].split(self.sizes)
        probe.load_state_dict({name: part.view(shape) for (name, shape), part in
                               zip(self.shapes.items(), parts, strict=True)})
        return probe
