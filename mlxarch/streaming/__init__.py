"""Parts of a model that stay on the disk, and are read when a token needs them."""
