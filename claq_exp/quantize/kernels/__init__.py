"""GPU kernels; each module imports Triton, so that it is imported only where a GPU is used."""
