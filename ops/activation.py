"""Activations and their backward."""
