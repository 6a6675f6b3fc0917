"""Thinking of a model: separated from its answer while it streams, and switched on or off."""
