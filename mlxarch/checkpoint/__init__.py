"""Checkpoint files of every format as lazily read tensors, without knowledge of any model."""
