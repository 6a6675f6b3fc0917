"""Memory planning: how many bytes a model needs on a machine, and how it will run there."""
