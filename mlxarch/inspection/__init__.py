"""Inspect an architecture without weights: structure, comparison tables, block diagrams."""
