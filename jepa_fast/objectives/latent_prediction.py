"""I-JEPA: predict a target encoder's representation of masked blocks from the visible context.

Assran et al., arXiv:2301.08243. Packed throughout: the context encoder sees only visible patches, all samples (and all
target blocks in the predictor) as one batch.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..masking import MultiBlock, PackedMasks
from ..models.encoder import VisionTransformer, VisionTransformerConfig
from ..models.predictor import Predictor, PredictorConfig
from ..models.target_encoder import TargetEncoder
from ..nn.block import Sequences, at_least_float32
from ..ops import latent_loss
from ..optim.schedules import Linear
from ._target_prediction import TargetPrediction, on_device, true_rows, true_statistics


@dataclass(frozen=True, kw_only=True)
class LatentPredictionConfig:
    encoder: VisionTransformerConfig = field(default_factory=VisionTransformerConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    masking: MultiBlock = field(default_factory=MultiBlock)
    momentum: Linear = field(default_factory=lambda: Linear(start=0.996, final=1.0))  # of the target encoder, over training
    beta: float = 1.0  # smooth-L1: quadratic below, linear above; 0 is L1

    def build(self) -> "LatentPrediction":
        return LatentPrediction(self)


class LatentPrediction(TargetPrediction):
    is_capturable = True    # steps differ in tensors only, so that a CUDA graph can replay them
    pad_tokens_to: int = 0  # set by the trainer: packed tokens come in multiples of this; 0: no padding

    def __init__(self, config: LatentPredictionConfig):
        super().__init__()
        config.masking.check_grid(config.encoder.grid)
        self.config = config
        self.encoder: VisionTransformer = config.encoder.build()
        self.predictor = Predictor(config.predictor, config.encoder.embed_dim, config.encoder.num_heads,
                                   config.encoder.grid)
        self.target_encoder = TargetEncoder(self.encoder)

    def prepare(self, batch: dict, *, seed: int, step: int, first_sample: int) -> dict:
        """Add the masks of this step: a function of (seed, step, number of the sample in the global batch)."""
        masks = self.config.masking.sample(self.config.encoder.grid, len(batch["images"]), seed=seed, step=step,
                                           first_sample=first_sample)
        return batch | {"masks": on_device(masks.pack(), self.pad_tokens_to, batch["images"].device)}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """{"images": [B, C, H, W], "masks": PackedMasks} -> {"loss": 0-dim, scalars and features to watch}.

        The features are the target encoder's tokens that any prediction is compared with, and no others.
        """
        masks = batch["masks"]
        prediction = self.predict(batch["images"], masks)
        target = at_least_float32(self.target_encoder.rows(batch["images"], masks))
        loss, statistics = latent_loss(prediction, target, masks.prediction_target_row, beta=self.config.beta,
                                       weight=sequence_weights(masks, prediction.dtype), return_stats=True)
        statistics = true_statistics(statistics, prediction.detach(), target, masks)
        return {"loss": loss, **statistics, "features": true_rows(target, masks)}

    def predict(self, images: Tensor, masks: PackedMasks) -> Tensor:
        """Predictions [P_t, D], in the order target block, context, sample, token."""
        context = self.encoder.context(images, masks.context_idx,
                                       Sequences(masks.context_cu_seqlens, masks.context_max_seqlen))
        sequences = Sequences(masks.predictor_cu_seqlens, masks.predictor_max_seqlen)
        prediction = self.predictor(context, masks.predictor_idx, masks.predictor_position, sequences,
                                    masks.prediction_idx,
                                    Sequences(masks.prediction_cu_seqlens, masks.prediction_max_seqlen))
        return at_least_float32(prediction)

    def targets(self, images: Tensor, masks: PackedMasks) -> Tensor:
        """The target encoder's tokens of the whole images, packed [B * N, D]."""
        return at_least_float32(self.target_encoder(images).flatten(0, 1))


def sequence_weights(masks: PackedMasks, dtype: torch.dtype) -> Tensor | None:
    """None for target blocks of one size (the plain mean, as official), else every block of every sample counts alike.

    With ragged blocks the mean over all tokens would depend on how samples are spread over ranks and micro-batches;
    the mean of each block's mean does not.
    """
    if masks.prediction_weight is not None:
        return masks.prediction_weight.to(dtype)
    lengths = masks.prediction_lengths
    if lengths is None:
        return None
    weights = 1.0 / (len(lengths) * lengths.to(dtype))
    return torch.repeat_interleave(weights, lengths, output_size=masks.prediction_idx.shape[0])
