"""Quantization methods: rounding, scale search, GPTQ, and error feedback across rows and layers.

``rounding``, ``scale_search`` and ``gptq`` choose scales, biases and codes. ``row_feedback``
compensates errors across the rows of a matrix, ``asymmetric_calibration`` across layers.
``matrix_quantizer`` combines them for one matrix, and ``row_chunks`` applies them to a few rows at a
time.
"""
