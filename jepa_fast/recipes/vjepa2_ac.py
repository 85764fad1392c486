"""V-JEPA 2-AC, arXiv:2506.09985: the official configuration to the last constant.

facebookresearch/vjepa2, configs/train/vitg16/droid-256px-8f.yaml. The official run also keeps an encoder that nothing
uses, in memory and in the optimizer; here there is one, frozen.
"""

from ..data import TrajectoryData
from ..data.trajectories import CentreCrop
from ..models.ac_predictor import ACPredictorConfig
from ..models.video_encoder import VideoTransformerConfig
from ..objectives.action_conditioned import ActionConditionedConfig
from ..optim.schedules import Constant, WarmupConstantLinear
from ._recipe import OptimConfig, Recipe, TrainConfig

__all__ = ["vjepa2_ac_vitg"]

PAPER = "arXiv:2506.09985"


def vjepa2_ac_vitg() -> Recipe:
    """Needs --objective.encoder-weights (vitg.pt) and --data.root; an epoch is 300 batches, as official."""
    return Recipe(
        name="vjepa2_ac_vitg", paper=PAPER, summary="V-JEPA 2-AC: 24 x 1024 predictor on a frozen ViT-g/16 at 256, DROID",
        objective=ActionConditionedConfig(
            encoder=VideoTransformerConfig(image_size=256, num_frames=2, patch_size=16, tubelet_size=2, embed_dim=1408,
                                           depth=40, num_heads=22, mlp_ratio=48 / 11, positions="rotary",
                                           rescale_init=True),
            predictor=ACPredictorConfig(embed_dim=1024, depth=24, num_heads=16), auto_steps=2),
        data=TrajectoryData(num_frames=8, fps=4.0, num_workers=12,
                            crop=CentreCrop(image_size=256, ratio=(0.75, 1.35))),
        optim=OptimConfig(lr=WarmupConstantLinear(start=7.5e-5, peak=4.25e-4, final=0.0, warmup_epochs=15,
                                                  anneal_epochs=15),
                          weight_decay=Constant(value=0.04)),
        train=TrainConfig(batch_size=256, epochs=315, steps_per_epoch=300, precision="bf16", seed=239))
