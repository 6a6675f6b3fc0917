"""Attention and its variants.

attention           grouped-query attention
latent_attention    multi-head latent attention; latent_config has its config keys
span                which tokens a token attends to: all, a sliding window, a chunk
layer_types         configs whose layers alternate between spans
forward_context     positions and masks that the layers of one pass share
blockwise           attention over blocks of keys, merged by an online softmax
bounded_eval        evaluate large arrays one after the other
"""
