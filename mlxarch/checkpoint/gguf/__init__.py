"""GGUF files: header, tensors, config and tokenizer as a checkpoint source."""
