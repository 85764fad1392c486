"""LeWorldModel on Two-Rooms, arXiv:2603.19312: the public configuration, and a smaller one.

The public runs read 10,000 recorded expert episodes; here the same expert walks on and on. An epoch is called 2,000 steps.
"""

from ..data.two_rooms import DiscRooms
from ..data.two_rooms_data import TwoRoomsData
from ..models.conditional_predictor import ConditionalPredictorConfig
from ..models.encoder import VisionTransformerConfig
from ..objectives.lejepa import SIGRegConfig
from ..objectives.leworldmodel import LeWorldModelConfig
from ..optim.schedules import Constant, WarmupCosine
from ._recipe import OptimConfig, Recipe, TrainConfig

__all__ = ["leworldmodel_two_rooms", "leworldmodel_two_rooms_small"]

PAPER = "arXiv:2603.19312"


def leworldmodel_two_rooms() -> Recipe:
    """The public lewm.yaml: ViT-tiny/14 at 224, 3 embeddings of history, 1 % of warm-up, 10 epochs as in the paper."""
    return Recipe(
        name="leworldmodel_two_rooms", paper=PAPER, summary="LeWorldModel: ViT-tiny/14 at 224, SIGReg, Two-Rooms",
        objective=LeWorldModelConfig(),
        data=TwoRoomsData(rooms=DiscRooms(), num_frames=4, num_samples=256_000),
        optim=OptimConfig(lr=WarmupCosine(start=5e-7, peak=5e-5, final=0.0, warmup_epochs=0.1, first_count=0),
                          weight_decay=Constant(value=1e-3), decay_all=True, clip_grad=1.0),
        train=TrainConfig(batch_size=128, epochs=10, precision="bf16", seed=3072))


def leworldmodel_two_rooms_small() -> Recipe:
    """The same rooms drawn at 48 x 48, a shallow ViT/8 of 96, a tenth of the steps or less, ten times as large."""
    return Recipe(
        name="leworldmodel_two_rooms_small", paper=PAPER,
        summary="reduced: LeWorldModel of 96 on Two-Rooms at 48",
        objective=LeWorldModelConfig(
            encoder=VisionTransformerConfig(image_size=48, patch_size=8, embed_dim=96, depth=4, num_heads=3,
                                            positions="learned", class_token=True),
            predictor=ConditionalPredictorConfig(depth=3, num_heads=4, head_dim=32, mlp_dim=384, dropout=0.1),
            embed_dim=96, projector_dim=512, sigreg=SIGRegConfig(num_slices=256)),
        data=TwoRoomsData(rooms=DiscRooms(image_size=48), num_frames=4, num_samples=6_400),
        optim=OptimConfig(lr=WarmupCosine(start=5e-6, peak=5e-4, final=0.0, warmup_epochs=0.5, first_count=0),
                          weight_decay=Constant(value=1e-3), decay_all=True, clip_grad=1.0),
        train=TrainConfig(batch_size=64, epochs=10, precision="fp32", seed=3072))
