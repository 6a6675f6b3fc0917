"""Sections of a tokenizer.json: what they may cost, and repairs of published mistakes."""
