"""SSD offload: experts and per-layer embeddings that are read from the disk when a token needs them."""
