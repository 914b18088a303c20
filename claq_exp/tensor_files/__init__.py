"""Safetensors: one file or the shards of many, written and read without their content in memory."""
