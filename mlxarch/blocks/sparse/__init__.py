"""Attention to few of the earlier tokens, which an indexer with small keys of its own chooses.

selection                choose the keys with the highest scores; masks and gathers for them
lightning_indexer        scores of single tokens (DeepSeek Sparse Attention)
sparse_latent_attention  multi-head latent attention to the chosen tokens
pools                    choose pools of neighbouring tokens
block_sparse_attention   attention to blocks scored by averages of their keys
pooled_latent_attention  latent attention to pools scored by learned averages
compressor               entries that stand for several neighbouring tokens
compressed_attention     attention to a window and to such entries
"""
