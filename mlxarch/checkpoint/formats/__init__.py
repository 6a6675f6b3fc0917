"""Quantization formats of other programs: FP8, MXFP4, AWQ and GPTQ, as MLX arrays."""
