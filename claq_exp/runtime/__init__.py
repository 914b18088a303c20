"""Packed weights at work: linear layers that multiply by codes, their kernels, Hugging Face."""
