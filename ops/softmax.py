"""Softmax and log-softmax, forward and backward."""
