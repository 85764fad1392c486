"""What frozen features are worth: probes, collapse monitors, pictures, and the page of a run. Nothing here trains."""

from .collapse import collapse_monitors, cosine, effective_rank, feature_moments, monitors_of_moments
from .curves import learning_curves, read_curves
from .knn import knn_accuracy
from .linear import LinearProbeResult, linear_probe
from .page import write_page
from .pca import principal_components
from .pictures import features_scatter, pca_features
from .probe_suite import evaluate_features
from .table import Table

__all__ = ["LinearProbeResult", "Table", "collapse_monitors", "cosine", "effective_rank", "evaluate_features",
           "feature_moments", "features_scatter", "knn_accuracy", "learning_curves", "linear_probe",
           "monitors_of_moments", "pca_features", "principal_components", "read_curves", "write_page"]
