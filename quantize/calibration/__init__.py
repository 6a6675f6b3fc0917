"""Calibration: statistics of activations and gradients, collected layer by layer.

``calibration`` chooses the tokens, which come from ``texts`` or are ``self_generated`` by the model.
``layerwise`` runs the model on them, one layer in memory at a time. Forward passes yield
``input_stats``; backward passes yield ``embedding_stats``, ``output_gradients`` and the
``sensitivity`` of the model to the quantization of each matrix.
"""
