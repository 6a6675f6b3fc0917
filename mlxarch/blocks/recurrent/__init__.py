"""Layers that keep a state of fixed size instead of keys and values: linear attention, convolutions.

Each has two forms that agree to rounding: one token after the other for decoding, and a parallel
form over chunks of tokens for prompts. Between passes the state is in a ``StateCache``.
"""
