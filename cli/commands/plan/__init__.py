"""Commands that predict memory and speed: fit, tune, compare."""
