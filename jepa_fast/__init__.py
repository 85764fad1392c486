"""jepa_fast: a fast, exact engine for joint-embedding predictive architectures (JEPA)."""
