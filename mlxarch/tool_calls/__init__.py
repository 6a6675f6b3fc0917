"""Tool calls: what each family of models writes to call a function, read while it streams, and held by a grammar."""
