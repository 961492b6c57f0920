"""Losses, forward and backward."""
