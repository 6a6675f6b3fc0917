"""Readers and grammars of calls, one class for each form that models write."""
