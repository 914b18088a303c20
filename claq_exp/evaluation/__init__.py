"""What a model can still do."""
