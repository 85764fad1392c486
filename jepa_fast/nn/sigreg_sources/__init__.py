"""SIGReg with the constructors, buffers, state-dicts and random numbers of the code it comes from, computed by one op.

    SlicingUnivariateTest(EppsPulley(), num_slices=1024)   lejepa
    MinimalSIGReg(knots=17)                                lejepa's MINIMAL.md
    LeWMSIGReg(knots=17, num_proj=1024)                    le-wm's module.SIGReg and stable-worldmodel's
    LightlySIGReg(knots=17, ...)                           lightly.loss.SIGReg
    SlicedEppsPulley(num_slices=1024)                      stable_pretraining.methods.lejepa
    BCS(num_slices=256, lmbd=10.0)                         eb_jepa.losses

A run with one of these in the place of the original draws the same directions and has the same losses, to rounding. Losses
are float32 also under autocast, where the originals round them to bfloat16. The forwards read nothing but the attributes
that the originals have, so that they also work as methods of those.
"""

from torch import nn

from ._knots import quadrature_of, unit_columns
from .eb_jepa import BCS, bcs
from .lejepa import EppsPulley, MinimalSIGReg, SlicingUnivariateTest, sliced_epps_pulley
from .lewm import LeWMSIGReg
from .lightly import LightlySIGReg
from .stable_pretraining import FlatEppsPulley, SlicedEppsPulley, flat_sliced_epps_pulley

# named as in nn.sigreg.PRESETS
SOURCES: dict[str, type[nn.Module]] = {
    "official": SlicingUnivariateTest, "minimal": MinimalSIGReg, "lewm": LeWMSIGReg, "lightly": LightlySIGReg,
    "stable_pretraining": SlicedEppsPulley, "bcs": BCS,
}

__all__ = ["BCS", "SOURCES", "EppsPulley", "FlatEppsPulley", "LeWMSIGReg", "LightlySIGReg", "MinimalSIGReg",
           "SlicedEppsPulley", "SlicingUnivariateTest", "bcs", "flat_sliced_epps_pulley", "quadrature_of",
           "sliced_epps_pulley", "unit_columns"]
