"""Copies that change layout or dtype, and fills."""
