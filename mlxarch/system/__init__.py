"""The machine and its files: back end, dtypes, paths, checksums, untrusted and durable files."""
