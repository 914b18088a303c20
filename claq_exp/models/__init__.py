"""Models as the experiments see them: a skeleton, decoder blocks, groups of linear layers."""
