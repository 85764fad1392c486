"""What frozen features are worth: probes, collapse monitors, pictures, and the page of a run. Nothing here trains."""

from .attentive import AttentiveProbe
from .clip_pictures import clip_strips
from .collapse import collapse_monitors, cosine, effective_rank, feature_moments, monitors_of_moments
from .curves import learning_curves, read_curves
from .knn import knn_accuracy
from .linear import LinearProbeResult, linear_probe
from .page import write_page
from .pca import principal_components
from .pictures import features_scatter, pca_features
from .probe_grid import VJEPA2_PROBES, VJEPA_PROBE, ProbeGridConfig, attentive_probe
from .probe_suite import evaluate_features
from .surprise import clip_surprise, latent_surprise, pairwise_accuracy, predict_window
from .table import Table

__all__ = ["AttentiveProbe", "LinearProbeResult", "ProbeGridConfig", "Table", "VJEPA2_PROBES", "VJEPA_PROBE",
           "attentive_probe", "clip_strips", "clip_surprise", "collapse_monitors", "cosine", "effective_rank",
           "evaluate_features", "feature_moments", "features_scatter", "knn_accuracy", "latent_surprise",
           "learning_curves", "linear_probe", "monitors_of_moments", "pairwise_accuracy", "pca_features",
           "predict_window", "principal_components", "read_curves", "write_page"]
