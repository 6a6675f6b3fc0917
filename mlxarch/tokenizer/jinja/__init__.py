"""Sandbox for chat templates: the allowed subset of Jinja, with limits on time and memory."""
