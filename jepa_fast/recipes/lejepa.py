"""LeJEPA, arXiv:2511.08544: the MINIMAL example and the README's configuration to the last constant, and a demo."""

from ..data import ImageFolderData, MnistData, TensorAugment, lejepa_minimal_views, lejepa_readme_views
from ..models.encoder import VisionTransformerConfig
from ..nn.sigreg import SIGRegConfig
from ..objectives.lejepa import LeJEPAConfig
from ..optim.schedules import Constant, WarmupCosine
from ._recipe import OptimConfig, Recipe, TrainConfig

__all__ = ["lejepa_mnist", "lejepa_minimal", "lejepa_vitl14"]

PAPER = "arXiv:2511.08544"
