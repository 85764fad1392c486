"""EB-JEPA on Two-Rooms: the configuration of facebookresearch/eb_jepa to the last constant, and one for two CPU cores.

Their encoder and their predictor are clipped by their own norms, here as there; the inverse dynamics and the probe,
unclipped there, by theirs. `--objective.inverse-dynamics-weight 0` is their ablation in which planning fails: the walls,
which differ from sample to sample and never move, can then be all that is encoded. The small recipe has one wall for all
samples, and plans without inverse dynamics too.
"""

from ..data.two_rooms import DotRooms
from ..data.two_rooms_data import TwoRoomsData
from ..models.impala import ImpalaConfig
from ..objectives.eb_jepa import EBJEPAConfig
from ..objectives.world_model import PlanningConfig
from ..optim.schedules import Constant, WarmupCosine
from ._recipe import OptimConfig, Recipe, TrainConfig

__all__ = ["eb_jepa_two_rooms", "eb_jepa_two_rooms_small"]

PAPER = "arXiv:2602.03604"


def eb_jepa_two_rooms() -> Recipe:
    """examples/ac_video_jepa: 65 x 65, 12 epochs of 100,000 samples; every epoch is of new ones."""
    return Recipe(
        name="eb_jepa_two_rooms", paper=PAPER, summary="EB-JEPA world model: Impala and GRU of 512, Two-Rooms at 65",
        objective=EBJEPAConfig(),
        data=TwoRoomsData(),
        optim=OptimConfig(lr=WarmupCosine(start=1e-11, peak=1e-3, final=1e-5, warmup_epochs=1.2, first_count=0),
                          weight_decay=Constant(value=1e-5), decay_all=True, clip_grad=2.0),
        train=TrainConfig(batch_size=384, epochs=12, precision="bf16", seed=1))


def eb_jepa_two_rooms_small() -> Recipe:
    """For two CPU cores: rooms with one wall and one door, drawn at 33 x 33, a narrower model, smaller batches.

    Samples have the 9 frames that 8 predictions need, and these are made from every frame, not from the first alone.
    """
    rooms = DotRooms(image_size=33, wall_range=(32, 32), door_range=(18, 18))
    return Recipe(
        name="eb_jepa_two_rooms_small", paper=PAPER, summary="demo: EB-JEPA of 256 on Two-Rooms at 33, minutes on two cores",
        objective=EBJEPAConfig(
            encoder=ImpalaConfig(image_size=33, widths=(8, 16, 32), num_blocks=1, num_outputs=256), unroll="parallel",
            planning=PlanningConfig(planner="icem", horizon=60, num_samples=100, num_iterations=5, num_elites=10,
                                    num_executed=5, warm_start=True)),
        data=TwoRoomsData(rooms=rooms, num_samples=19_200, num_frames=9),
        optim=OptimConfig(lr=WarmupCosine(start=1e-11, peak=2e-3, final=1e-5, warmup_epochs=0.8, first_count=0),
                          weight_decay=Constant(value=1e-5), decay_all=True, clip_grad=2.0),
        train=TrainConfig(batch_size=64, epochs=8, precision="fp32", seed=1))
