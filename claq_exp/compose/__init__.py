"""From the words of a command line to a config; with `sweep/` all that knows Hydra."""
