"""V-JEPA and V-JEPA 2: predict a target encoder's representation of masked tubelets from the visible ones.

Bardes et al., arXiv:2404.08471; Assran et al., arXiv:2506.09985. Every clip is masked in several ways (two officially:
many short blocks, few long ones); all of them go through the context encoder, and through the predictor, as one packed
batch. The loss is the mean absolute difference, each kind of mask counting alike.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..masking import Masks, MultiBlock3D, PackedMasks
from ..models.target_encoder import TargetEncoder
from ..models.video_encoder import VideoTransformer, VideoTransformerConfig
from ..models.video_predictor import VideoPredictor, VideoPredictorConfig
from ..nn.block import Sequences, at_least_float32
from ..ops import latent_loss
from ..optim.schedules import Constant, Linear
from ._target_prediction import TargetPrediction, on_device, true_rows, true_statistics
from .latent_prediction import sequence_weights


@dataclass(frozen=True, kw_only=True)
class VideoPredictionConfig:
    encoder: VideoTransformerConfig = field(default_factory=VideoTransformerConfig)
    predictor: VideoPredictorConfig = field(default_factory=VideoPredictorConfig)
    masking: MultiBlock3D = field(default_factory=MultiBlock3D)
    momentum: Linear | Constant = field(default_factory=lambda: Linear(start=0.998, final=1.0))  # of the target encoder
    mask_token_by: Literal["mask", "clip"] = "mask"  # whose number picks the mask token: V-JEPA's, V-JEPA 2's
    num_clip_lengths: int = 1     # lengths of clips in a batch; each counts alike in the loss
    reg_coeff: float = 0.0        # weight of the predictions' variance over the tokens of a clip; officially 0

    def __post_init__(self):
        if self.mask_token_by not in ("mask", "clip"):
            raise ValueError(f"mask_token_by must be mask or clip, got {self.mask_token_by!r}")
        if self.predictor.num_mask_tokens < self.num_mask_tokens:
            what = "kind of mask" if self.mask_token_by == "mask" else "clip length"
            raise ValueError(f"predictor.num_mask_tokens must be at least {self.num_mask_tokens}, one per {what}, "
                             f"got {self.predictor.num_mask_tokens}")

    @property
    def num_mask_tokens(self) -> int:
        """Those that train."""
        return len(self.masking.masks) if self.mask_token_by == "mask" else self.num_clip_lengths

    def build(self) -> "VideoPrediction":
        return VideoPrediction(self)


class VideoPrediction(TargetPrediction):
    is_capturable = True    # steps differ in tensors only, so that a CUDA graph can replay them
    pad_tokens_to: int = 0  # set by the trainer: packed tokens come in multiples of this; 0: no padding

    def __init__(self, config: VideoPredictionConfig):
        super().__init__()
        config.masking.check_grid(config.encoder.grid)
        self.config = config
        self.encoder: VideoTransformer = config.encoder.build()
        self.predictor = VideoPredictor(config.predictor, config.encoder)
        for token in self.predictor.mask_tokens[config.num_mask_tokens:]:
            token.requires_grad_(False)  # kept because the official checkpoints have them
        self.target_encoder = TargetEncoder(self.encoder)

    def prepare(self, batch: dict, *, seed: int, step: int, first_sample: int) -> dict:
        """Add the masks of this step: a function of (seed, step, number of the sample in the global batch)."""
        packed = []
        for clips in as_list(batch["clips"]):
            masks = self.config.masking.sample(self.encoder.patch_embed.grid(clips), len(clips), seed=seed, step=step,
                                               first_sample=first_sample)
            packed.append(on_device(self.pack(masks), self.pad_tokens_to, clips.device))
        return batch | {"masks": packed}

    def pack(self, masks: Masks) -> PackedMasks:
        """Masks with row numbers that name the mask tokens of this model."""
        by_mask = self.config.mask_token_by == "mask"
        return masks.pack(num_mask_tokens=self.config.num_mask_tokens if by_mask else 1)

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """{"clips": [B, C, T, H, W], or a list with one such tensor per clip length, "masks": PackedMasks of each}
        -> {"loss": 0-dim, scalars and features to watch}.

        The features are the target encoder's tokens that any prediction is compared with, and no others.
        """
        groups = list(zip(as_list(batch["clips"]), as_list(batch["masks"]), strict=True))
        if len(groups) != self.config.num_clip_lengths:
            raise ValueError(f"clips must have num_clip_lengths = {self.config.num_clip_lengths} lengths, "
                             f"got {len(groups)}")
        results = [self._group(clips, masks, number) for number, (clips, masks) in enumerate(groups)]
        out = {name: sum(result[name] for result in results) / len(results) for name in results[0] if name != "features"}
        return out | {"features": results[0]["features"]}

    def _group(self, clips: Tensor, masks: PackedMasks, number: int) -> dict[str, Tensor]:
        prediction = self.predict(clips, masks, number)
        target = at_least_float32(self.target_encoder.rows(clips, masks))
        loss, statistics = latent_loss(prediction, target, masks.prediction_target_row, beta=0.0,
                                       weight=sequence_weights(masks, prediction.dtype), return_stats=True)
        statistics = true_statistics(statistics, prediction.detach(), target, masks)
        if self.config.reg_coeff:
            statistics["variance_loss"] = variance_loss(prediction, masks)
            loss = loss + self.config.reg_coeff * statistics["variance_loss"]
        return {"loss": loss, **statistics, "features": true_rows(target, masks)}

    def predict(self, clips: Tensor, masks: PackedMasks, group: int = 0) -> Tensor:
        """Predictions [Q, D], in the order kind of mask, sample, token; `group` is the number of the clip length."""
        context = self.encoder.context(clips, masks.context_idx,
                                       Sequences(masks.context_cu_seqlens, masks.context_max_seqlen))
        is_by_clip = self.config.mask_token_by == "clip"
        tokens = slice(group, group + 1) if is_by_clip else slice(self.config.num_mask_tokens)
        return at_least_float32(self.predictor(context, masks, self.encoder.patch_embed.grid(clips), tokens))

    def targets(self, clips: Tensor) -> Tensor:
        """The target encoder's tokens of the whole clips, packed [B * N, D]."""
        return at_least_float32(self.target_encoder(clips).flatten(0, 1))


def variance_loss(prediction: Tensor, masks: PackedMasks) -> Tensor:
    """How far the predictions' standard deviation over the tokens of a clip stays below 1: mean(relu(1 - std)).

    prediction [Q, D]; std = sqrt(unbiased variance + 1e-4) [kinds, B, D], averaged over the kinds of mask first.
    """
    cu_seqlens, num_lists = masks.prediction_cu_seqlens, masks.num_targets * masks.batch_size
    rows = torch.arange(len(prediction), dtype=cu_seqlens.dtype, device=prediction.device)
    sequence = torch.bucketize(rows, cu_seqlens[1:], right=True)
    # padding is in sequences of its own, the last ones
    count = cu_seqlens.diff().clamp(min=1).to(prediction.dtype).unsqueeze(1)
    mean = prediction.new_zeros(len(count), prediction.shape[1]).index_add(0, sequence, prediction) / count
    squares = torch.zeros_like(mean).index_add(0, sequence, (prediction - mean[sequence]).square())[:num_lists]
    std = torch.sqrt(squares / (count[:num_lists] - 1) + 1e-4)
    return torch.relu(1 - std.unflatten(0, (-1, masks.batch_size)).mean(0)).mean()


def as_list(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]
