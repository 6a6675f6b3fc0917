"""Constraints on what a model writes: JSON schemas, regular expressions and grammars as masks of the next token."""
