"""Number formats in which neighbouring numbers share a scale, and a codebook."""
