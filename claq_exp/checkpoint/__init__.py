"""Packed checkpoints in the Hugging Face layout, and the store that lets a run continue."""
