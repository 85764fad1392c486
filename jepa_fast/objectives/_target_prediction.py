"""What objectives share that predict the tokens of a target encoder: I-JEPA, V-JEPA, V-JEPA 2, V-JEPA 2.1."""

from torch import Tensor, nn

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
