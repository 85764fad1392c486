"""Any recipe at a size for tests: a narrow, shallow model, few synthetic samples, a small batch; all else as it is."""

import dataclasses

from jepa_fast.data import (
    IjepaTransform,
    MovingDigitsData,
    MultiCrop,
    SyntheticData,
    SyntheticTrajectoryData,
    SyntheticVideoData,
)
from jepa_fast.models.resnet import ResNetConfig
from jepa_fast.objectives.action_conditioned import ActionConditionedConfig
from jepa_fast.objectives.eb_jepa import EBJEPAConfig
from jepa_fast.objectives.latent_prediction import LatentPredictionConfig
from jepa_fast.objectives.lejepa import LeJEPAConfig
from jepa_fast.objectives.leworldmodel import LeWorldModelConfig
from jepa_fast.objectives.video_prediction import VideoPredictionConfig
from jepa_fast.objectives.video_prediction21 import HierarchicalVideoPredictionConfig
from jepa_fast.recipes import Recipe


def shrink(recipe: Recipe) -> Recipe:
    objective, data = OBJECTIVES[type(recipe.objective)](recipe)
    return dataclasses.replace(
        recipe, objective=objective, data=data,
        train=dataclasses.replace(recipe.train, batch_size=8, precision="fp32", device="cpu", max_steps=3, log_every=1,
                                  activations="all"))


def latent_prediction(recipe: Recipe):
    objective = recipe.objective
    encoder = objective.encoder
    encoder = dataclasses.replace(encoder, embed_dim=12 * encoder.num_heads, depth=2,
                                  image_size=min(encoder.image_size, 12 * encoder.patch_size))
    objective = dataclasses.replace(
        objective, encoder=encoder,
        predictor=dataclasses.replace(objective.predictor, embed_dim=12 * encoder.num_heads, depth=2),
        masking=dataclasses.replace(objective.masking, mask_group_size=4))
    return objective, images(recipe, encoder)


def lejepa(recipe: Recipe):
    objective = recipe.objective
    encoder, small = objective.encoder, {"num_outputs": min(objective.encoder.num_outputs, 16)}
    small |= {"width": 8} if isinstance(encoder, ResNetConfig) else {"embed_dim": 12 * encoder.num_heads, "depth": 2}
    encoder = dataclasses.replace(encoder, **small)
    objective = dataclasses.replace(objective, encoder=encoder, projector=(32, 32, objective.projector[-1]),
                                    sigreg=dataclasses.replace(objective.sigreg, num_slices=64))
    return objective, images(recipe, encoder)


NARROW = dict(embed_dim=48, depth=2, num_heads=3)


def video_prediction(recipe: Recipe):
    objective = recipe.objective
    encoder = dataclasses.replace(objective.encoder, **NARROW, mlp_ratio=4.0, num_frames=4,
                                  image_size=5 * objective.encoder.patch_size)
    objective = dataclasses.replace(
        objective, encoder=encoder, predictor=dataclasses.replace(objective.predictor, **NARROW),
        masking=dataclasses.replace(objective.masking, mask_group_size=4))
    if isinstance(recipe.data, MovingDigitsData):
        return objective, dataclasses.replace(recipe.data, num_frames=4, image_size=encoder.image_size, num_clips=24)
    return objective, SyntheticVideoData(
        num_videos=16, num_frames=4, image_size=encoder.image_size, in_chans=encoder.in_chans,
        transform=dataclasses.replace(recipe.data.transform, image_size=encoder.image_size))


def hierarchical_video_prediction(recipe: Recipe):
    """Two levels; lambda is whole from the first step, or the head of the context would not learn."""
    objective = recipe.objective
    encoder = dataclasses.replace(objective.encoder, **NARROW, mlp_ratio=4.0, levels=(0, 1), num_frames=4,
                                  image_size=5 * objective.encoder.patch_size)
    objective = dataclasses.replace(
        objective, encoder=encoder, context_warmup=None, predictor=dataclasses.replace(objective.predictor, **NARROW),
        masking=dataclasses.replace(objective.masking, mask_group_size=4),
        image_masking=dataclasses.replace(objective.image_masking, mask_group_size=4))
    crop = dataclasses.replace(recipe.data.videos.transform, image_size=encoder.image_size)
    videos = SyntheticVideoData(num_videos=16, num_frames=4, image_size=encoder.image_size, transform=crop)
    return objective, dataclasses.replace(recipe.data, videos=videos,
                                          images=SyntheticData(num_images=32, image_size=encoder.image_size))


def action_conditioned(recipe: Recipe):
    """A random frozen encoder of 4 x 4 patches, and noise for trajectories."""
    objective = recipe.objective
    heads = objective.predictor.num_heads
    objective = dataclasses.replace(
        objective, encoder_weights="random",
        encoder=dataclasses.replace(objective.encoder, image_size=64, embed_dim=44, depth=1, num_heads=2),
        predictor=dataclasses.replace(objective.predictor, embed_dim=12 * heads, depth=2))
    return objective, SyntheticTrajectoryData(num_files=16, num_frames=recipe.data.num_frames, num_workers=0,
                                              crop=dataclasses.replace(recipe.data.crop, image_size=64))


def eb_jepa(recipe: Recipe):
    objective = recipe.objective
    encoder = dataclasses.replace(objective.encoder, image_size=17, widths=(4, 6), num_blocks=1, num_outputs=16)
    return dataclasses.replace(objective, encoder=encoder, unroll_steps=2), rooms(recipe, 17)


def leworldmodel(recipe: Recipe):
    objective = recipe.objective
    encoder = objective.encoder
    encoder = dataclasses.replace(encoder, image_size=2 * encoder.patch_size, embed_dim=12 * encoder.num_heads, depth=1)
    predictor = dataclasses.replace(objective.predictor, depth=1, num_heads=2, head_dim=8, mlp_dim=32)
    objective = dataclasses.replace(objective, encoder=encoder, predictor=predictor, embed_dim=24, projector_dim=32,
                                    sigreg=dataclasses.replace(objective.sigreg, num_slices=64))
    return objective, rooms(recipe, encoder.image_size)


def rooms(recipe: Recipe, image_size: int):
    return dataclasses.replace(recipe.data, num_samples=24, num_frames=4,
                               rooms=dataclasses.replace(recipe.data.rooms, image_size=image_size))


def images(recipe: Recipe, encoder) -> SyntheticData:
    transform, image_size = recipe.data.transform, encoder.image_size
    if isinstance(transform, IjepaTransform):
        transform = dataclasses.replace(transform, image_size=image_size)
    if isinstance(transform, MultiCrop) and transform.num_local:
        image_size, transform = 56, dataclasses.replace(transform, global_size=56, local_size=42)
    return SyntheticData(num_images=16, image_size=image_size, in_chans=encoder.in_chans, transform=transform)


OBJECTIVES = {ActionConditionedConfig: action_conditioned, EBJEPAConfig: eb_jepa, LatentPredictionConfig: latent_prediction,
              HierarchicalVideoPredictionConfig: hierarchical_video_prediction, LeJEPAConfig: lejepa,
              LeWorldModelConfig: leworldmodel, VideoPredictionConfig: video_prediction}
