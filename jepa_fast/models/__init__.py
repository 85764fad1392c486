"""Encoder, predictor, target encoder."""
