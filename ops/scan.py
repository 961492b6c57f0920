"""Scans: cumulative sums, products, maxima."""
