"""Commands that generate text, and the server: run, chat, serve, ps, stop."""
