"""Open-weight language models on the machine in front of you."""
