"""Commands that generate text: run, chat, serve."""
