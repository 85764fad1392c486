"""What objectives share that predict the tokens of a target encoder: I-JEPA, V-JEPA, V-JEPA 2, V-JEPA 2.1."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..masking import PackedMasks, pad
from ..models.target_encoder import TargetEncoder


class TargetPrediction(nn.Module):
    """An encoder and a predictor that train, and a moving average of the encoder that does not."""

    encoder: nn.Module
    predictor: nn.Module
    target_encoder: TargetEncoder

    def averages(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Pairs (parameter, its moving average) for the optimizer to keep."""
        return self.target_encoder.averages(self.encoder)

    def roles(self) -> dict[str, nn.Module]:
        """What trains, in the order of the official optimizer's groups."""
        return {"encoder": self.encoder, "predictor": self.predictor}

    def evaluation_encoder(self) -> nn.Module:
        """The encoder whose features are judged: the target encoder, as in the papers."""
        return self.target_encoder.encoder


def on_device(masks: PackedMasks, pad_tokens_to: int, device: torch.device) -> PackedMasks:
    """Masks padded where that is asked for, on their way to a device."""
    return (pad(masks, pad_tokens_to) if pad_tokens_to else masks).to(device, non_blocking=True)


@torch.no_grad()
def true_statistics(statistics: dict[str, Tensor], prediction: Tensor, target: Tensor,
                    masks: PackedMasks) -> dict[str, Tensor]:
    """The statistics of `latent_loss` without the padded predictions that it counted in; nothing is read on the host."""
    if not masks.num_padding:
        return statistics
    is_padding = masks.prediction_weight[-masks.num_padding:] == 0
    z, t = prediction[-masks.num_padding:], target[masks.prediction_target_row[-masks.num_padding:]]
    rows = {"cosine": F.cosine_similarity(z, F.layer_norm(t, t.shape[1:]), dim=1), "prediction_power": z.square().mean(1),
            "target_std": t.std(1, correction=0)}
    total = len(prediction)
    return {name: (statistics[name] * total - torch.where(is_padding, values, 0).sum()) / (total - is_padding.sum())
            for name, values in rows.items()}


def true_rows(target: Tensor, masks: PackedMasks) -> Tensor:
    """Target rows for the monitors: as many as are never padding, whatever the lengths of a step."""
    return target[: max(len(target) - masks.num_padding, 1)]
