"""V-JEPA 2.1: predict a target encoder at several depths, for masked tokens and for visible ones, of clips and images.

arXiv:2603.14482. As V-JEPA 2, with three changes. The targets are several levels of the encoder, each layer-normed and
each counting alike. The context is predicted too, a token with weight 1 / d where d^2 is its distance to the nearest
masked token. Clips and images train one trunk behind two stems; officially half of the ranks see only images, here every
batch holds both and the loss is the same: image_share * L_images + (1 - image_share) * L_clips, whatever their numbers.
All tokens of a batch go through the target encoder, the encoder and the predictor as one packed sequence each.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..masking import BlockMask, Masks, MultiBlock3D, PackedMasks, nearest_target
from ..models.target_encoder import TargetEncoder
from ..models.video_encoder21 import HierarchicalVideoTransformer, HierarchicalVideoTransformerConfig
from ..models.video_predictor21 import HierarchicalVideoPredictor, HierarchicalVideoPredictorConfig
from ..nn.block import Sequences, at_least_float32
from ..ops import latent_loss
from ..optim.schedules import Constant, Linear
from ._target_prediction import TargetPrediction
from .latent_prediction import sequence_weights
from .video_prediction import as_list


@dataclass(frozen=True, kw_only=True)
class HierarchicalVideoPredictionConfig:
    encoder: HierarchicalVideoTransformerConfig = field(default_factory=HierarchicalVideoTransformerConfig)
    predictor: HierarchicalVideoPredictorConfig = field(default_factory=HierarchicalVideoPredictorConfig)
    masking: MultiBlock3D = field(default_factory=lambda: MultiBlock3D(mask_group_size=48))   # of clips
    image_masking: MultiBlock3D = field(default_factory=lambda: MultiBlock3D(masks=(BlockMask(num_blocks=10),),
                                                                             mask_group_size=72))
    momentum: Linear | Constant = field(default_factory=lambda: Constant(value=0.99925))  # of the target encoder
    image_share: float = 0.5             # of the images in the loss where a batch holds both
    context_weight: float = 0.5          # lambda of clips: how much the loss of context tokens counts; 0: none
    image_context_weight: float = 0.5    # lambda of images
    context_warmup: tuple[int, int] | None = (15_000, 30_000)  # steps: lambda is 0 before, whole after; None: always whole
    weight_by_distance: bool = True      # context tokens far from all targets count less

    def __post_init__(self):
        if not 0 <= self.image_share <= 1:
            raise ValueError(f"image_share must be in [0, 1], got {self.image_share}")
        for name in ("context_weight", "image_context_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.context_warmup is not None and not 0 <= self.context_warmup[0] < self.context_warmup[1]:
            raise ValueError(f"context_warmup must be two steps in rising order, got {self.context_warmup}")
        width = self.predictor.target_dim
        if width not in (None, self.encoder.embed_dim):
            raise ValueError(f"predictor.target_dim must be the encoder's width {self.encoder.embed_dim}, whose average "
                             f"makes the targets, got {width}")

    def warmup(self, step: int) -> float:
        """The fraction of lambda that is in force in a step."""
        if self.context_warmup is None:
            return 1.0
        start, end = self.context_warmup
        return min(max((step - start) / (end - start), 0.0), 1.0)

    def build(self) -> "HierarchicalVideoPrediction":
        return HierarchicalVideoPrediction(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Clips of one length, or the images, of a batch: what they are, their masks, and how they count."""

    pixels: Tensor                      # [B, C, T, H, W] or [B, C, H, W]
    masks: PackedMasks
    context_loss_weight: float          # lambda in this step
    nearness: Tensor | None             # [C] float64: 1 / d of every context token; None: all count alike
    is_image: bool


class HierarchicalVideoPrediction(TargetPrediction):
    def __init__(self, config: HierarchicalVideoPredictionConfig):
        super().__init__()
        config.masking.check_grid(config.encoder.grid)
        config.image_masking.check_grid(config.encoder.image_grid)
        self.config = config
        self.encoder: HierarchicalVideoTransformer = config.encoder.build()
        self.predictor = HierarchicalVideoPredictor(config.predictor, config.encoder)
        self.target_encoder = TargetEncoder(self.encoder)

    def prepare(self, batch: dict, *, seed: int, step: int, first_sample: int) -> dict:
        """Add the groups of this step, with masks that are a function of (seed, step, number in the global batch).

        first_sample numbers the clips; images have a global batch of their own, in proportion.
        """
        groups, num_clips = [], None
        scale = self.config.warmup(step)
        for clips in as_list(batch["clips"]) if "clips" in batch else []:
            num_clips = len(clips)
            masks = self.config.masking.sample(self.encoder.grid(clips), num_clips, seed=seed, step=step,
                                               first_sample=first_sample)
            groups.append(self.group(clips, masks, scale))
        if "images" in batch:
            images = batch["images"]
            first = first_sample if num_clips is None else first_sample * len(images) // num_clips
            masks = self.config.image_masking.sample(self.encoder.grid(images), len(images), seed=seed, step=step,
                                                     first_sample=first)
            groups.append(self.group(images, masks, scale))
        if not groups:
            raise ValueError(f"a batch must hold clips, images or both, got {', '.join(batch) or 'nothing'}")
        return batch | {"groups": groups}

    def group(self, pixels: Tensor, masks: Masks, scale: float = 1.0) -> Group:
        """Pixels with their masks on the same device; `scale` is the part of lambda in force."""
        is_image = self.encoder.is_image(pixels)
        weight = scale * (self.config.image_context_weight if is_image else self.config.context_weight)
        nearness = None
        if weight and self.config.weight_by_distance:
            nearness = nearest_target(masks, self.encoder.grid(pixels)).double().pow(-0.25).to(pixels.device)
        packed = masks.pack().to(pixels.device, non_blocking=True)
        return Group(pixels=pixels, masks=packed, context_loss_weight=weight, nearness=nearness, is_image=is_image)

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """{"groups": of `prepare`} -> {"loss": 0-dim, scalars and features to watch}."""
        groups = batch["groups"]
        masks = PackedMasks.join([group.masks for group in groups])
        targets = self.targets(groups, masks)
        sizes = [group.masks.batch_size * group.masks.num_tokens for group in groups]
        own_targets = list(zip(*(level.split(sizes) for level in targets), strict=True))
        parts = zip(groups, *self.predict(groups, masks), own_targets, strict=True)
        results = [self._losses(*part) for part in parts]
        out = {name: sum(result[name] for result in results) / len(results) for name in results[0]}
        for name, is_image in (("loss_clips", False), ("loss_images", True)):
            own = [result["loss"] for group, result in zip(groups, results, strict=True) if group.is_image == is_image]
            out |= {name: sum(own) / len(own)} if own else {}
        return out | {"loss": self._total(groups, results), "features": targets[-1]}

    def targets(self, groups: list[Group], masks: PackedMasks) -> list[Tensor]:
        """The target encoder's levels of all groups, packed [sum of B * N, D] each."""
        with torch.no_grad():
            levels = self._encode(self.target_encoder.encoder, groups, [None] * len(groups), masks.full_cu_seqlens,
                                  max(group.masks.num_tokens for group in groups))
        return [at_least_float32(level) for level in levels]

    def predict(self, groups: list[Group], masks: PackedMasks) -> tuple[list, list]:
        """Of each group the predictions of every level, [Q, D] each; and those of context tokens, [C, D], or None."""
        levels = self._encode(self.encoder, groups, [group.masks.context_idx for group in groups],
                              masks.context_cu_seqlens, masks.context_max_seqlen)
        with_context = any(group.context_loss_weight for group in groups)
        targets, contexts = self.predictor(
            levels, masks, [self.encoder.grid(group.pixels) for group in groups], [group.is_image for group in groups],
            [len(group.masks.context_idx) for group in groups], with_context)
        predictor = self.predictor
        predictions = [predictor.project(rows, predictor.predictor_proj)
                       for rows in targets.split([len(group.masks.prediction_idx) for group in groups])]
        if not with_context:
            return predictions, [None] * len(groups)
        parts = contexts.split([len(group.masks.context_prediction_idx) for group in groups])
        return predictions, [predictor.project(rows, predictor.predictor_proj_context) if group.context_loss_weight
                             else None for group, rows in zip(groups, parts, strict=True)]

    def _encode(self, encoder: HierarchicalVideoTransformer, groups: list[Group], rows: list[Tensor | None],
                cu_seqlens: Tensor, max_seqlen: int) -> list[Tensor]:
        """The levels that the predictor reads, of all groups packed end to end."""
        parts = [encoder.embed(group.pixels, index) for group, index in zip(groups, rows, strict=True)]
        x, rotary = (torch.cat(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
        levels = self.config.encoder.levels[-self.predictor.num_levels:]
        return encoder.encode(x, Sequences(cu_seqlens, max_seqlen, rotary), levels)

    def _losses(self, group: Group, predictions: list[Tensor], contexts: list[Tensor] | None,
                targets: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The loss of one group and its terms, each the mean over levels, every kind of mask counting alike."""
        masks, dtype = group.masks, targets[0].dtype
        out = mean_over_levels(predictions, targets, masks.prediction_target_idx, sequence_weights(masks, dtype))
        out["prediction_loss"] = out["loss"]
        if contexts is None:
            # a zero, so that the head that was left out gets gradients of zero: it decays and counts its steps
            out["context_term"] = 0.0 * sum(p.sum() for p in self.predictor.predictor_proj_context.parameters())
        else:
            context = mean_over_levels(contexts, targets, masks.context_target_idx,
                                       context_weights(masks, group.nearness, dtype))
            out["context_term"] = group.context_loss_weight * context["loss"]
        return out | {"loss": out["prediction_loss"] + out["context_term"]}

    def _total(self, groups: list[Group], results: list[dict[str, Tensor]]) -> Tensor:
        """Images together count image_share, clip lengths alike; where there is but one modality, it is all."""
        num_images = sum(group.is_image for group in groups)
        num_clips, share = len(groups) - num_images, self.config.image_share
        if not num_images or not num_clips:
            share = 1.0 if num_images else 0.0
        return sum((share / num_images if group.is_image else (1 - share) / num_clips) * result["loss"]
                   for group, result in zip(groups, results, strict=True))


def mean_over_levels(predictions: list[Tensor], targets: tuple[Tensor, ...], target_idx: Tensor,
                     weight: Tensor | None) -> dict[str, Tensor]:
    """L1 distance of every level's prediction from its normalised target, and statistics: means over the levels."""
    results = [latent_loss(prediction, target, target_idx, beta=0.0, weight=weight, return_stats=True)
               for prediction, target in zip(predictions, targets, strict=True)]
    stats = {name: sum(stats[name] for _, stats in results) / len(results) for name in results[0][1]}
    return {"loss": sum(loss for loss, _ in results) / len(results), **stats}


def context_weights(masks: PackedMasks, nearness: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[C]: 1 / (number of lists * tokens in the list) times 1 / d: the mean, not divided by the sum of 1 / d."""
    lengths = masks.predictor_cu_seqlens.diff() - masks.prediction_cu_seqlens.diff()
    weights = torch.repeat_interleave(1.0 / (len(lengths) * lengths.to(dtype)), lengths,
                                      output_size=len(masks.context_prediction_idx))
    return weights if nearness is None else weights * nearness.to(dtype)
