"""Rewrites of a model that computes the same and is quantized better."""
