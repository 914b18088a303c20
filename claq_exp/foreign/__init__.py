"""Checkpoints that others made: what they are, what they store, and how their owners load them."""
