"""Modality to tokens and their grid."""
