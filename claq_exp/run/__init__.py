"""The flow of one experiment, from config to results."""
