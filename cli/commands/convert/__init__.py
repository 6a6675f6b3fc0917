"""Commands that write or evaluate checkpoints: quantize, pack, slice, eval."""
