"""Normalization layers, forward and backward."""
