"""From a text to what the solver needs to know of a layer's inputs."""
