"""Quantization formats of MLX, and how config.json spells them.

formats          tables of allowed bits, group sizes and modes; no MLX needed
scheme           ``Quantization``: bits, group size and mode of one matrix, and what to do with them
config_section   ``quantization`` of config.json
kv_vectors       quantization of the keys and values in a KV cache
bit_packing      integer codes to MLX's packed uint32 words
"""
