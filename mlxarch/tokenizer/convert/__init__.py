"""Tokenizer files of publishers, converted to the contents of a tokenizer.json."""
