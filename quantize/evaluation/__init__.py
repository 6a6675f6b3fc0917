"""Evaluation of a quantized model: perplexity and KL divergence with standard errors."""
