"""Model loading: from config.json and tensors to a network with its weights."""
