"""Batch to {"loss": ...}: the JEPA itself."""
