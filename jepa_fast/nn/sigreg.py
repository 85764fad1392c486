"""The SIGReg loss with its directions and its step counter, and the settings of every public variant."""

import torch
from torch import Tensor, nn

from ..ops import Quadrature, sigreg
from .sigreg_sources import SOURCES

# what each source computes; where a source draws directions from the global generator, which cannot be repeated, ours
# are counter-based. x [..., N, D] as the source passes it on: views first, LeWM time first. Knots on [0, t_max], for
# the integral over [-t_max, t_max], unless t_min is given.
PRESETS: dict[str, dict] = {
    # rbalestr-lab/lejepa: EppsPulley, SlicingUnivariateTest
    "official": dict(t_max=3.0, num_knots=17, num_slices=1024, rng="torch", process_group="auto",
                     ddp_weighting="rank"),
    # rbalestr-lab/lejepa, MINIMAL.md
    "minimal": dict(t_max=3.0, num_knots=17, num_slices=256, scale="N"),
    # lucas-maes/le-wm and stable-worldmodel
    "lewm": dict(t_max=3.0, num_knots=17, num_slices=1024, scale="N"),
    # the LeWM paper's appendix, as its forks read it
    "lewm_paper": dict(t_min=0.2, t_max=4.0, num_knots=17, num_slices=1024, scale="none"),
    # LeJEPA paper (arXiv:2511.08544), algorithm 1
    "paper": dict(t_min=-5.0, t_max=5.0, num_knots=17, num_slices=256, rng="torch", process_group="auto",
                  ddp_weighting="rank"),
    # facebookresearch/eb_jepa, BCS: x is its two inputs, stacked
    "bcs": dict(t_min=-3.0, t_max=3.0, num_knots=10, num_slices=256, scale="none", rng="torch", process_group="auto",
                ddp_weighting="rank"),
    # rbalestr-lab/stable-pretraining, with the all-reduce that it computes and throws away
    "stable_pretraining": dict(t_max=3.0, num_knots=17, num_slices=1024, rng="torch", group_dims="flatten",
                               process_group="auto", ddp_weighting="rank"),
    # lightly.loss.SIGReg; process_group="auto" is its gather_distributed=True
    "lightly": dict(t_max=3.0, num_knots=17, num_slices=1024),
}


class SIGReg(nn.Module):
    """SIGReg with directions drawn anew in every step, from (seed, global_step).

    Knots as in `Quadrature.half_line(t_max, num_knots)`, or `Quadrature.trapezoid` where t_min is given; `options` are
    the other keyword arguments of `ops.sigreg`. `global_step`, an int64 buffer named as in the official state-dict,
    moves on by one with every forward pass in training mode (officially in evaluation too) and is not read on the host,
    but for rng="torch". A resumed run goes on with the directions it would have drawn; ranks that start from one
    checkpoint have the same ones (officially a MAX over the ranks in every step). Gradients to x only.
    """

    def __init__(self, t_max: float = 3.0, num_knots: int = 17, t_min: float | None = None, **options):
        super().__init__()
        unknown = options.keys() - (sigreg.__kwdefaults__.keys() - {"quadrature", "row_mask", "step"})
        if unknown:
            raise ValueError(f"SIGReg has no option {', '.join(sorted(unknown))}")
        if t_min is None:
            self.quadrature = Quadrature.half_line(t_max, num_knots)
        else:
            self.quadrature = Quadrature.trapezoid(t_min, t_max, num_knots)
        self.options = options
        self.register_buffer("global_step", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_preset(cls, name: str, **options) -> "SIGReg":
        """What a source computes, in this class and with its options; `options` override the preset's."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**PRESETS[name] | options)

    @staticmethod
    def from_source(name: str, *args, **kwargs) -> nn.Module:
        """A drop-in for a source's own module: its constructor, buffers, state-dict and random numbers."""
        if name not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {name!r}")
        return SOURCES[name](*args, **kwargs)

    def forward(self, x: Tensor, row_mask: Tensor | None = None, directions: Tensor | None = None) -> Tensor:
        """x [..., N, D] -> scalar float32, or [..., K] for reduction None. `directions` [D, K] replace drawn ones."""
        loss = sigreg(x, directions, quadrature=self.quadrature, step=self.global_step, row_mask=row_mask,
                      **self.options)
        if self.training:
            self.global_step += 1
        return loss

    def extra_repr(self) -> str:
        knots = self.quadrature.knots
        options = {"knots": f"{len(knots)} in [{knots[0]:.3g}, {knots[-1]:.3g}]"} | self.options
        return ", ".join(f"{key}={value}" for key, value in options.items())
